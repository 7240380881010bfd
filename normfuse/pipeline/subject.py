"""What the user gave: a model with its example inputs, captured and run."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram

from normfuse.capture.effects import attributes_put_back, random_sites
from normfuse.capture.export import captures
from normfuse.errors import CaptureError, VerificationError
from normfuse.graph.program import Program
from normfuse.progress import say
from normfuse.verification.trials import NothingCompared, Trials, make_trials, original_run, run_as_given, same_twice

Model = nn.Module | ExportedProgram


def capture_and_try(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, trials: int
) -> tuple[Program, Trials | None, dict[str, float]]:
    """Capture, and run the captured program at other sizes: where those it calls free are not, capture with fewer."""
    seconds = {"capture": 0.0, "verify": 0.0}
    failure: VerificationError | None = None
    ways = captures(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    while True:
        started = time.perf_counter()
        say("capture")
        captured = next(ways, None)
        seconds["capture"] += time.perf_counter() - started
        if captured is None:
            assert failure is not None
            raise failure
        _check_outputs(captured)
        say("running the original, also in float64")
        started = time.perf_counter()
        try:
            with attributes_put_back(model):
                tried = _trials(model, captured, args, kwargs, trials) if trials else None
        except NothingCompared:
            raise
        except VerificationError as error:
            failure = failure or error
            continue
        finally:
            seconds["verify"] += time.perf_counter() - started
        return captured, tried, seconds


def model_name(model: Model) -> str:
    return type(model).__name__


def _check_outputs(program: Program) -> None:
    outputs = program.output.args[0]
    if not any(isinstance(getattr(n, "meta", {}).get("val"), torch.Tensor) for n in outputs):  # type: ignore[union-attr]
        raise CaptureError("the model returns no tensor: there is nothing to optimize or to verify")


def _trials(model: Model, captured: Program, args: Any, kwargs: Any, count: int) -> Trials:
    runnable, args, kwargs = as_runnable(model, args, kwargs)
    example = captured.signature.flatten(tuple(args), kwargs or {})
    as_given = run_as_given(runnable, args, kwargs)
    if (drawn := random_sites(captured)) and not same_twice(as_given):
        raise VerificationError(
            f"the model draws random numbers ({drawn[0]}), so that no two runs can be compared: call model.eval(), pass "
            "them as an input, or verify=False"
        )
    return make_trials(captured, original_run(runnable, captured), example, count, as_given)


def example_leaves(program: Program, model: Model, args: Any, kwargs: Any) -> list[Any] | None:
    """The example inputs as the program takes them; None where there are none that could be computed with."""
    if isinstance(model, ExportedProgram) and not args and not kwargs:
        if model.example_inputs is None:
            return None
        args, kwargs = model.example_inputs
    leaves = program.signature.flatten(tuple(args), kwargs or {})
    tensors = (t for t in (*leaves, *program.tensors.values()) if isinstance(t, torch.Tensor))
    return None if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors) else leaves


def as_runnable(model: Model, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any]:
    """An ExportedProgram brings its own example inputs."""
    if not isinstance(model, ExportedProgram):
        return model, args, kwargs
    if not args and not kwargs and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    return model.module(), args, kwargs
