"""The public verbs. Only here do engine and passes meet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from normfuse.capture.export import capture, captures
from normfuse.errors import CaptureError, own_errors
from normfuse.graph.program import Program
from normfuse.graph.signature import Signature
from normfuse.inventory.inventory import Inventory, take_inventory
from normfuse.lower.choose import check_backend, choose, executable
from normfuse.lower.target import Run
from normfuse.lower.torch import device_of, fastest, graph_module
from normfuse.optimized.compare import candidate64
from normfuse.optimized.module import Optimized
from normfuse.pipeline.lowering import ready
from normfuse.pipeline.run import Pipeline, detached
from normfuse.pipeline.select import select
from normfuse.pipeline.sharing import shared_names, unshared
from normfuse.pipeline.source import Source
from normfuse.pipeline.subject import Model, as_runnable, capture_and_try, example_leaves, model_name
from normfuse.progress import say
from normfuse.report import Report
from normfuse.report.books import report_of
from normfuse.rewrite import Rule
from normfuse.verification.numerics import EXACT, Mismatch, Verification, relative_error
from normfuse.verification.trials import NothingCompared, Trials, original_run
from normfuse.weights.adapters import Adapter
from normfuse.weights.program import WeightProgram

TRIALS = 3


def pass_table() -> tuple[Rule, ...]:
    """Every pass in the order in which they run; installed plug-ins (group `normfuse.passes`) stand last."""
    from importlib.metadata import entry_points

    from normfuse.passes import TABLE  # pyright: ignore[reportMissingImports]

    return (*TABLE, *(point.load() for point in entry_points(group="normfuse.passes")))


@own_errors
def optimize(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    passes: Sequence[str | Rule] | None = None,
    disable: Sequence[str] = (),
    backend: str = "torch",
    verify: bool = True,
    copy: bool = False,
) -> Optimized:
    """A module that computes the same function as `model`, rewritten by every exact pass that applies.

    `args`, `kwargs`: example inputs as `torch.export.export` takes them. `dynamic_shapes`: `"auto"` lets batch and
    sequence vary, `None` fixes all sizes. `passes`: names of the only passes to run, in any order. `backend`: `"torch"`,
    `"inductor"`, `"onnxruntime"` (or `"onnxruntime:<provider>"`), or `"auto"`, the fastest of them on the example inputs.
    `model` is not changed. Weights that no pass touches are shared with it, the others are computed from it once: when it is
    given other weights in place, the result would be a mixture, and warns; `copy` shares nothing.

    Raises `CaptureError`, `PassError`; `LoweringError` for a backend that is not there or cannot be called on the example;
    `VerificationError` if the model cannot be verified at all.
    """
    started = time.perf_counter()
    check_backend(backend)
    rules = select(pass_table(), passes, disable)
    captured, trials, seconds = capture_and_try(model, args, kwargs, dynamic_shapes, TRIALS if verify else 0)
    result = Pipeline(captured, rules, named=passes is not None, seconds=seconds).run(trials)
    shared = shared_names(result.baked, captured)
    if copy:
        result = unshared(result, shared)
    lowering = time.perf_counter()
    say(f"lower to {backend}")
    report = report_of(model_name(model), result, backend, captured.notes)
    example = example_leaves(captured, model, args, kwargs)
    source = None if example is None else Source.of(model, captured, result.unbaked, example, trials)
    optimized = Optimized(
        result.baked,
        report,
        ledger=detached(result.unbaked),
        backend=backend,
        source=source,
        excluded=result.unlowered,
        shared=frozenset() if copy else shared,
    )
    if backend == "auto":
        _take_fastest(optimized, model, args, kwargs, lambda each: _ready(optimized, result.unbaked, each, trials))
    elif backend != "torch" and trials is not None:  # what plain torch runs, verification has run
        optimized.run_with(_ready(optimized, result.unbaked, backend, trials), backend)
    elif backend != "torch" and example is not None:
        optimized.call_once(example)
    report.seconds = result.seconds | {"lower": time.perf_counter() - lowering}
    report.seconds["total"] = time.perf_counter() - started
    return optimized


def _ready(optimized: Optimized, unbaked: Program, backend: str, trials: Trials | None) -> Run:
    """The backend's executable, proved on the trials; what its lowering had to leave out is told, and left out for good."""
    if trials is None:
        return executable(optimized.program, backend, optimized.excluded)
    run, lowered = ready(unbaked, backend, trials, optimized.excluded)
    optimized.excluded = lowered.log.excluded
    optimized.report.rolled_back += lowered.rolled_back
    optimized.report.refusals += lowered.rolled_back
    return run


def _take_fastest(optimized: Optimized, model: Model, args: Any, kwargs: Any, make: Callable[[str], Run]) -> None:
    """Measure the backends; where none is faster than the model as it was given, that is what runs."""
    runnable, args, kwargs = as_runnable(model, args, kwargs)
    leaves = optimized.program.signature.flatten(tuple(args), kwargs or {})
    original = original_run(runnable, optimized.program)
    chosen = choose(make, lambda *given: original(list(given)), leaves)
    optimized.run_with(chosen.run, "torch" if chosen.backend == "original" else chosen.backend)
    optimized.report.notes += chosen.notes()


@own_errors
def optimize_flat(
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    dynamic_shapes: Any = "auto",
    passes: Sequence[str | Rule] | None = None,
    disable: Sequence[str] = (),
    verify: bool = True,
) -> tuple[torch.fx.GraphModule, Signature]:
    """`optimize` for compilers: a graph of flat tensors in and out, lowered for the device its weights are on.

    The graph checks nothing; what its inputs must be is in the signature.
    """
    rules = select(pass_table(), passes, disable)
    captured, trials, seconds = capture_and_try(model, args, {}, dynamic_shapes, 1 if verify else 0)
    result = Pipeline(captured, rules, named=passes is not None, seconds=seconds).run(trials)
    return graph_module(fastest(result.baked, device_of(result.baked), result.unlowered)), result.baked.signature


@own_errors
def optimize_(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Sequence[str | Rule] | None = None,
    disable: Sequence[str] = (),
    verify: bool = True,
) -> Report:
    """Rewrite the user's own modules: new parameter values, LayerNorms replaced by RMSNorms, folded norms removed.

    The Python code, `generate()`, caches and device placement of the model stay as they are. What a rewrite changes in
    the graph and no module can hold is refused, with the reason. `report.weights` names each new parameter as the model
    does now. Capture the model as it is used: what the example call does not reach is not looked at.

    Raises `CaptureError`, `PassError`; `VerificationError` if the changed model does not compute the same: it is then
    bit for bit what it was.
    """
    from normfuse.inplace import optimize_modules

    if not isinstance(cast("object", model), nn.Module):
        raise CaptureError(f"optimize_ changes modules, and a {type(model).__name__} is none: use optimize")
    started = time.perf_counter()
    rules = select(pass_table(), passes, disable)
    captured, trials, seconds = capture_and_try(model, args, kwargs, "auto", TRIALS if verify else 0)
    pipeline = Pipeline(captured, rules, named=passes is not None, seconds=seconds)
    again = captures(model, args, kwargs)
    done = optimize_modules(model, pipeline, trials, original_run(model, captured), again)
    report = report_of(model_name(model), done.result, "torch", captured.notes)
    report.rewrites = [r for r in report.rewrites if r.pass_name not in done.unwritten]
    report.fired = {name: count for name, count in report.fired.items() if name not in done.unwritten}
    report.refusals = [*report.refusals, *done.refusals]
    report.weights, report.verification = done.weights, done.verification
    report.seconds = done.result.seconds | {"total": time.perf_counter() - started}
    return report


@own_errors
def inspect(
    model: Model, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = "auto"
) -> Inventory:
    """Every norm, softmax and attention of the model, counted once each however it is spelt."""
    if isinstance(model, Optimized):  # its program is raised already, and says more than what was lowered from it
        return take_inventory(model.program, model.report.model)
    captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    raised, _ = Pipeline(captured, (), named=False).raise_()
    return take_inventory(raised, model_name(model))


@own_errors
def explain(
    model: Model, pass_name: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> str:
    """Where a pass fires in the model, where it does not, and why not: the nearest misses with the nodes round them.

    `raise_functions`, `raise_attention` and `raise_frozen_batch_norm` stand for recognition itself.
    """
    from normfuse.pipeline.explanation import explanation
    from normfuse.recognise import RULES

    rule = select((*RULES, *pass_table()), [pass_name])[0]
    captured = capture(model, args, kwargs)
    return explanation(captured, pass_table(), rule, model_name(model))


@own_errors
def verify(
    reference: Model,
    candidate: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    trials: int = TRIALS,
) -> Verification:
    """Do two models compute the same function? Both are run in float64 throughout and in their own dtype.

    A candidate made by `optimize` is judged by its weight programs over the reference's weights; any other by its own
    weights, which may differ by one rounding each. Raises `CaptureError` if a model cannot be captured.
    """
    _, left_args, left_kwargs = as_runnable(reference, args, kwargs)
    try:
        captured, drawn, _ = capture_and_try(reference, args, kwargs, "auto", max(1, trials))
    except NothingCompared as nothing:
        return Verification(False, math.inf, math.inf, math.inf, max(1, trials), str(nothing))
    assert drawn is not None
    drawn.forget_small()
    right, _, _ = as_runnable(candidate, args, kwargs)
    own = original_run(right, captured)
    right64, limit = candidate64(candidate, captured, drawn, left_args, left_kwargs)
    try:
        error64 = max(relative_error(right64, drawn.reference64), default=0.0)
    except Mismatch as mismatch:
        return Verification(False, math.inf, math.inf, math.inf, len(drawn.inputs), str(mismatch))
    if limit > EXACT and error64 >= limit:
        limit = max(limit, *drawn.sensitivity())
    return drawn.judge(error64, lambda inputs: [own(leaves) for leaves in inputs], limit)


def load(path: str | Path) -> Optimized:
    """An optimized model from a file that `Optimized.save` wrote (any other `.pt2` archive is loaded as it is).

    Raises `NormfuseError` for what is not such a file.
    """
    return Optimized.load(path)


@own_errors
def export_onnx(
    model: Model | Optimized,
    path: str | Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "onnxruntime",
    dynamic_shapes: Any = "auto",
    opset: int | None = None,
    verify: bool = True,
) -> Any:
    """Optimize the model (unless it is optimized already) and write it as an ONNX file; returns an `OnnxReport`.

    `target="onnx"`: standard operators alone, for any runtime. With `verify` what the file is printed from is compared
    with the model in float64, and the file itself in onnxruntime: the report has both errors, or says why not. A model
    that was loaded is compared with itself, on the inputs given here.

    Raises `LoweringError` for a place that cannot be written, and for a file that computes something else.
    """
    if isinstance(model, Optimized):
        example = (args, dict(kwargs or {})) if args or kwargs else None
        return model.export_onnx(path, target=target, opset=opset, verify=verify, example=example)
    optimized = optimize(model, args, kwargs, dynamic_shapes=dynamic_shapes, verify=verify)
    return optimized.export_onnx(path, target=target, opset=opset, verify=verify)


def replay(weights: Mapping[str, WeightProgram], state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The new parameters for another checkpoint of the same model: `replay(optimized.report.weights, state_dict)`."""
    from normfuse.weights.replay import replay as run

    return run(weights, state_dict)


def carry_adapters(
    weights: Mapping[str, WeightProgram], state_dict: Mapping[str, torch.Tensor], adapters: Mapping[str, Adapter]
) -> dict[str, Adapter | torch.Tensor]:
    """LoRA adapters trained before `optimize`, for the parameters after it: an `Adapter` each, a difference for a vector.

    `weights` is `optimized.report.weights`, `state_dict` the checkpoint they were trained on, `adapters` by parameter.
    Raises `NormfuseError` where a new parameter is no linear function of an adapted one.
    """
    from normfuse.weights.adapters import carry

    return carry(weights, state_dict, adapters)
