"""The way of `optimize_`: rewrite, leave out what cannot be written back, write, verify, or put everything back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from torch import Tensor, fx, nn

from normfuse.errors import VerificationError
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.program import Program
from normfuse.inplace.plan import Plan, plan_write_back
from normfuse.inplace.write import write_back
from normfuse.pipeline.run import Pipeline, Result, detached
from normfuse.rewrite import Exactness, Phase
from normfuse.rewrite.driver import RuleError
from normfuse.rewrite.record import FiringKey, Log, Refusal
from normfuse.verification.bisect import to_blame
from normfuse.verification.numerics import EXACT, Mismatch, Verification, relative_error
from normfuse.verification.trials import Run, Trials
from normfuse.weights.program import WeightProgram, evaluate, sources_of


@dataclasses.dataclass
class Done:
    """What was written: the pipeline's result, the plan, what could not be written, and the verdict on the model."""

    result: Result
    plan: Plan
    refusals: list[Refusal]
    verification: Verification | None
    weights: dict[str, WeightProgram]
    unwritten: frozenset[str]


def optimize_modules(
    model: nn.Module, pipeline: Pipeline, trials: Trials | None, run: Run, captures: Iterator[Program]
) -> Done:
    """Change `model` to what the pipeline makes of it, or leave it bit for bit as it was and raise."""
    silent = frozenset(r.name for r in pipeline.rules if r.exactness is Exactness.BITWISE and r.phase is Phase.RAISE)
    result, plan, refusals = _writable(model, pipeline, trials, silent)
    tensors = _tensors(result, plan)
    with pipeline.timed("write"):
        written = write_back(model, plan, tensors)
    try:
        with pipeline.timed("verify"):
            verification = _verify(result, trials, run, captures)
    except BaseException:
        written.undo()
        raise
    return Done(result, plan, refusals, verification, _ledger(result, plan), silent)


def _writable(
    model: nn.Module, pipeline: Pipeline, trials: Trials | None, silent: frozenset[str]
) -> tuple[Result, Plan, list[Refusal]]:
    """A set of rewrites that the modules can hold, found by leaving out those to blame for each problem."""
    raised, _ = pipeline.raise_()
    cleaner = Pipeline(pipeline.captured, [r for r in pipeline.rules if r.name in silent], named=pipeline.named)
    old = cleaner.rewrite(raised, Log())

    def attempt(excluded: frozenset[FiringKey]) -> tuple[Plan, Log]:
        while True:
            log = Log(excluded=excluded)
            try:
                return plan_write_back(model, old, pipeline.rewrite(raised, log), log.replaced), log
            except RuleError as bug:
                excluded |= {to_blame(log, bug)}

    left_out: dict[frozenset[FiringKey], dict[Refusal, None]] = {}
    fits_now = False
    while True:
        excluded = frozenset[FiringKey]().union(*left_out)
        plan, log = attempt(excluded)
        if not plan.problems:
            if not fits_now:  # once: what verification rolls back may bring a problem of its own
                _readmit(left_out, lambda keys: not attempt(keys)[0].problems)
            fits_now = True
            excluded = frozenset[FiringKey]().union(*left_out)
            result = pipeline.run(trials, excluded)
            plan, log = plan_write_back(model, old, result.unbaked, result.log.replaced), result.log
            if not plan.problems:
                return result, plan, list(dict.fromkeys(refusal for each in left_out.values() for refusal in each))
        suspects = _suspects(plan, log, silent)
        if not suspects:
            raise VerificationError(f"the rewritten program cannot be told apart by module: {plan.problems[0].reason}")
        guilty = suspects[0]
        if len(suspects) > 1:
            guilty = min(suspects, key=lambda keys: len(attempt(excluded | keys)[0].problems))
        left_out[guilty] = dict.fromkeys(_refused(plan, log, guilty))


def _readmit(
    left_out: dict[frozenset[FiringKey], dict[Refusal, None]], fits: Callable[[frozenset[FiringKey]], bool]
) -> None:
    """What was left out before the last, which is to blame, comes back where everything can be written with it, too."""
    for keys in list(left_out)[:-1]:
        if fits(frozenset[FiringKey]().union(*(other for other in left_out if other is not keys))):
            del left_out[keys]


def _suspects(plan: Plan, log: Log, silent: frozenset[str]) -> list[frozenset[FiringKey]]:
    """The rewrites that may have made the problems, by pass, the last pass first."""
    named = {key for problem in plan.problems for key in problem.firings}
    permits = [key for key in reversed(log.permits) if key[0] not in silent]
    if not named & set(permits):
        return [frozenset({key}) for key in permits[:1]]  # nothing tells: the last one that could have
    passes = dict.fromkeys(key[0] for key in permits if key in named)
    return [frozenset(key for key in permits if key in named and key[0] == name) for name in passes]


def _refused(plan: Plan, log: Log, guilty: frozenset[FiringKey]) -> Iterator[Refusal]:
    for problem in plan.problems:
        for key in guilty & problem.firings or (guilty if not problem.firings else ()):
            yield Refusal(key[0], log.sites.get(key, key[1]), f"cannot be written back, {problem.site}: {problem.reason}")


def _nodes(plan: Plan) -> list[fx.Node]:
    norms = [node for norm in plan.norms.values() for node in (norm.weight, norm.bias) if node is not None]
    return [*plan.values.values(), *norms]


def _tensors(result: Result, plan: Plan) -> dict[fx.Node, Tensor]:
    """Every weight of the plan by its node: from bake where it made it, else a tensor of the model or its own value."""
    tensors = result.baked.tensors
    baked = {weight.node: tensors[name] for name, weight in result.ledger.items() if name in tensors}
    found: dict[fx.Node, Tensor] = {}
    for node in _nodes(plan):
        if node.op == "get_attr":
            found[node] = result.unbaked.tensors[str(node.target)]
        elif node not in found:
            found[node] = baked[node] if node in baked else evaluate(result.unbaked, node)
    return found


def _ledger(result: Result, plan: Plan) -> dict[str, WeightProgram]:
    """The changed parameters by the names that they have in the model now."""
    program = detached(result.unbaked)
    named = dict(plan.values)
    for path, norm in plan.norms.items():
        named |= {f"{path}.{k}": n for k, n in (("weight", norm.weight), ("bias", norm.bias)) if n is not None}
    dtypes = {name: node.meta["val"].dtype for name, node in named.items()}
    return {n: WeightProgram(n, sources_of(node), dtypes[n], program, node) for n, node in named.items()}


def _verify(result: Result, trials: Trials | None, run: Run, captures: Iterator[Program]) -> Verification | None:
    """The changed modules against the float64 reference, and against the rewritten program in float64.

    The second comparison is sharp: the modules hold the very weights of that program, so nothing but rounding may tell
    them apart. Raises `VerificationError` if they do not compute the same.
    """
    if trials is None or result.verification is None:
        return None
    try:
        verdict = trials.judge(0.0, lambda inputs: [run(leaves) for leaves in inputs])
        wanted = run_float64(result.baked, trials.inputs)
        errors = (max(relative_error(run_float64(p, trials.inputs), wanted), default=0.0) for p in captures)
        error = next((e for e in errors if e < EXACT), math.inf)
    except Mismatch as mismatch:
        raise VerificationError(f"{_RESTORED}: {mismatch}") from mismatch
    except Exception as failure:
        raise VerificationError(f"{_RESTORED}: it no longer runs: {failure!r:.200}") from failure
    if not verdict or not error < EXACT:
        why = verdict.reason or f"in float64 it differs by {error:.1e} from the rewritten program"
        raise VerificationError(f"{_RESTORED}: {why}")
    return dataclasses.replace(verdict, error_float64=max(result.verification.error_float64, error))


_RESTORED = "the changed modules do not compute what the model did, and were put back as they were"
