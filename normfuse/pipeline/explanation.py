"""`normfuse explain`: one pass on one model: where it fired, where it did not, which condition failed, and what is there.

The nearest miss of each reason is shown with the user's source line and the nodes round it, and so is what recognition
has nearly taken for a norm, a softmax or an attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from normfuse.graph.node import is_tensor, op_name, shape, site, value
from normfuse.graph.program import Program
from normfuse.pipeline.run import Pipeline
from normfuse.recognise import RULES
from normfuse.recognise.nearly import Nearly, near_misses
from normfuse.rewrite import Rule
from normfuse.rewrite.record import Log, Refusal

_AROUND = 10
_SHOWN = 4


@dataclass
class Watching(Log):
    """A log that draws the surroundings of what is refused, while they are still there."""

    watched: str = ""
    drawn: dict[str, list[str]] = field(default_factory=dict)

    def refuse(self, pass_name: str, node: fx.Node, reason: str) -> None:
        super().refuse(pass_name, node, reason)
        if pass_name == self.watched and reason not in self.drawn:
            self.drawn[reason] = list(surroundings(node))


def explanation(captured: Program, table: Sequence[Rule], rule: Rule, model: str) -> str:
    """Runs what stands before the pass in the table, then the pass, and tells what it did and did not."""
    log = Watching(watched=rule.name)
    if rule in RULES:
        raised, _ = Pipeline(captured, (), named=False).raise_(log)
    else:
        before = [r for r in table[: list(table).index(rule)] if not r.on_request]
        pipeline = Pipeline(captured, (*before, rule), named=False)
        raised, _ = pipeline.raise_()
        pipeline.rewrite(raised, log)
    fired = [r for r in log.rewrites if r.pass_name == rule.name]
    refused = [r for r in log.refusals if r.pass_name == rule.name]
    lines = [f"{rule.name} on {model}", "", rule.doc, "", f"fired {len(fired)} times" + (":" if fired else "")]
    lines += [f"  {r.site}: {r.before} -> {r.after}" for r in fired]
    lines.append(f"refused {len(refused)} times" + (":" if refused else ""))
    lines += _refused(refused, log)
    missed = list(near_misses(raised))
    if missed:
        lines += ["", "nearly recognised:", *_missed(missed)]
    elif not fired and not refused:
        lines.append("nothing in the model looks like what this pass is for")
    return "\n".join(lines)


def _refused(refusals: Sequence[Refusal], log: Watching) -> Iterator[str]:
    """Reasons that differ by numbers alone together; the nodes round the first site of each."""
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault(re.sub(r"\d+", "#", refusal.reason), []).append(refusal)
    for alike in groups.values():
        yield f"  {_listed([r.site for r in alike])}"
        yield f"    {alike[0].reason}"
        yield from (f"      {line}" for line in log.drawn.get(alike[0].reason, []))


def _listed(sites: Sequence[str]) -> str:
    return ", ".join(sites[:_SHOWN]) + (f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else "")


def _missed(missed: Sequence[Nearly]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for each in missed:
        groups.setdefault((each.like, each.reason), []).append(each.node)
    for (like, reason), nodes in groups.items():
        yield f"  {_listed([site(n) for n in nodes])}"
        article = "an" if like[0] in "aeiou" else "a"
        yield f"    this looks like {article} {like}, but {reason}"
        yield from (f"      {line}" for line in surroundings(nodes[0]))


# -- printing nodes -----------------------------------------------------------------------------------------------


def surroundings(node: fx.Node, around: int = _AROUND) -> Iterator[str]:
    """The user's line, then the node among those that it is computed from and that read it, about ten in all."""
    line = user_code(node)
    if line:
        yield f"| {line}"
    near = _nearest(node, around)
    width = max(len(n.name) for n in near)
    for each in near:
        yield f"{'>' if each is node else ' '} {each.name:<{width}} = {spelt(each)}"


def _nearest(node: fx.Node, around: int) -> list[fx.Node]:
    found = {node: None}
    ring = [node]
    while ring and len(found) < around:
        following: list[fx.Node] = []
        for current in ring:
            for other in (*current.all_input_nodes, *current.users):
                if other not in found and other.op == "call_function" and len(found) < around:
                    found[other] = None
                    following.append(other)
        ring = following
    return sorted(found)


def spelt(node: fx.Node) -> str:
    """`layer_norm(add_3, [32], ...) [2, s0, 32] bfloat16`: a call as a person would write it, and what comes of it."""
    if node.op != "call_function":
        return str(node.target) if node.op != "output" else "the output of the model"
    given = [_written(a) for a in node.args] + [f"{k}={_written(v)}" for k, v in node.kwargs.items()]
    text = f"{op_name(node)}({', '.join(given)})"
    if not is_tensor(node):
        return text
    sizes = ", ".join(str(s) for s in shape(node))
    return f"{text}  [{sizes}] {str(value(node).dtype).removeprefix('torch.')}"


def _written(item: Any) -> str:
    if isinstance(item, fx.Node):
        return str(item.target) if item.op == "get_attr" else item.name
    if isinstance(item, tuple | list):
        return f"[{', '.join(map(_written, item))}]"
    if isinstance(item, torch.dtype):
        return str(item).removeprefix("torch.")
    return f"{item:g}" if isinstance(item, float) else str(item)


def user_code(node: fx.Node) -> str:
    """`modeling_gpt2.py:305: hidden_states = self.ln_1(hidden_states)`, where torch recorded it."""
    trace = node.meta.get("stack_trace") or ""
    where = re.search(r"\((\S+:\d+)\)$", site(node))
    if where is None:
        return ""
    name, _, number = where[1].rpartition(":")
    code = re.search(rf'{re.escape(name)}", line {number}, in [^\n]*\n\s*(?!File )([^\n]+)', trace)
    return f"{where[1]}: {code[1].strip()}" if code else where[1]
