"""`normfuse explain`: one pass on one model, site by site, with the surroundings of each refusal."""

from __future__ import annotations

from collections.abc import Sequence

from normfuse.pipeline import Pipeline
from normfuse.program import Program
from normfuse.rewrite import Rule
from normfuse.rewrite.record import Log


def explanation(captured: Program, table: Sequence[Rule], rule: Rule, model: str) -> str:
    """Runs what stands before the pass in the table, then the pass, and tells what it did and did not."""
    before = [r for r in table[: list(table).index(rule)] if not r.on_request]
    pipeline = Pipeline(captured, (*before, rule), named=False)
    raised, _ = pipeline.raise_()
    log = Log()
    pipeline.rewrite(raised, log)
    lines = [f"{rule.name} on {model}", "", rule.doc, ""]
    fired = [r for r in log.rewrites if r.pass_name == rule.name]
    refused = [r for r in log.refusals if r.pass_name == rule.name]
    lines.append(f"fired {len(fired)} times" + (":" if fired else ""))
    lines += [f"  {r.site}: {r.before} -> {r.after}" for r in fired]
    lines.append(f"refused {len(refused)} times" + (":" if refused else ""))
    lines += [f"  {r.site}: {r.reason}" for r in refused]
    if not fired and not refused:
        lines.append("nothing in the model looks like what this pass is for")
    return "\n".join(lines)
