"""Capture: a module, an ExportedProgram or an fx graph becomes a Program.

There is one road: `torch.export` before dispatch. A GraphModule (symbolic trace, Dynamo) is a module like any other and
is retraced; an ExportedProgram is taken as it is. `dynamic_shapes="auto"` lets every dimension vary that can, and falls
back step by step; why a size is fixed stands in the program's notes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.capture.caches import support_transformers_caches
from normfuse.capture.canonical import from_exported
from normfuse.capture.effects import (
    attributes_put_back,
    buffers_put_back,
    left_as_it_is,
    random_sites,
    refuse_changed_objects,
    tensors_of,
    written_to,
)
from normfuse.capture.fixed import fixed_sizes, notes_of
from normfuse.capture.shapes import IMAGE_RANK, Attempt, CallCounter, Shapes, attempts, every_input_named
from normfuse.errors import CaptureError, InputError
from normfuse.graph.carried import ADVICE, copied, lost
from normfuse.graph.program import Program
from normfuse.graph.signature import bind
from normfuse.ops.tracing import TRACING


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Shapes = "auto",
    check_training: bool = True,
) -> Program:
    """The canonical program of `model` for inference.

    `args` and `kwargs` are example inputs as `torch.export.export` takes them; `dynamic_shapes` as in `optimize`.
    Raises `CaptureError` naming the module, the source line and what to try.
    """
    return next(captures(model, args, kwargs, dynamic_shapes=dynamic_shapes, check_training=check_training))


def captures(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Shapes = "auto",
    check_training: bool = True,
) -> Iterator[Program]:
    """Every way in which the model can be captured, the one with the most free sizes first; each is made when asked for.

    Raises `CaptureError` if there is none.
    """
    if isinstance(model, ExportedProgram):
        with TRACING:
            program = from_exported(model)
        yield program
        return
    _check_model(model, check_training)
    _check_inputs(args, kwargs)
    parameters = _signature(model)
    try:
        positional, named = bind(parameters, args, kwargs or {})
    except InputError as error:
        raise CaptureError(f"{type(model).__name__}: {error}") from None
    support_transformers_caches()
    if why := lost(positional, "args") or lost(named):
        raise CaptureError(f"{type(model).__name__}: its inputs lose state when they are taken apart: {why} -- {ADVICE}")
    given = (*positional, *named.values())
    mutable = any(not isinstance(each, Tensor | int | float | str | tuple | None) for each in given)
    images = any(t.dim() >= IMAGE_RANK and t.is_floating_point() for t in _tensors(positional, named))
    calls = _run_once(model, positional, named) if images or mutable else Counter()
    failure: CaptureError | None = None
    made = 0
    earlier: Mapping[str, str] = {}
    ways = attempts(model, positional, named, dynamic_shapes, calls)
    while True:
        try:
            with TRACING, every_input_named(model, parameters, named):
                if (attempt := next(ways, None)) is None:
                    break
                reason = attempt.reason or (f"with it free, {failure}".partition(" -- ")[0] if failure is not None else "")
                program = _export(model, attempt, parameters, reason, earlier)
            earlier = program.signature.fixed
            program.signature.flatten(args, kwargs or {})
        except (CaptureError, InputError) as error:
            if failure is None and not (images or mutable):
                _run_once(model, positional, named)  # its own error says more than the exporter's
            failure = failure or CaptureError(str(error))
            continue
        made += 1
        yield program
    if failure is not None and not made:
        raise failure


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, int]:
    """What the model calls on the example; its own error, where it fails there, with the sizes as they are.

    A model without data (on the meta device) is not run.
    """
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers(), *_tensors(args, kwargs))):
        return Counter()
    try:
        given, named = copied((args, kwargs))
        before = tensors_of((given, named))
        with torch.no_grad(), left_as_it_is(model) as written, CallCounter() as counter:
            result = model(*given, **named)
    except Exception as error:
        raise CaptureError(_explain(model, error, "does not run on the example")) from error
    if written:
        raise CaptureError(written_to(written[0]))
    refuse_changed_objects(model, before, (given, named), result)
    return counter.calls


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _check_model(model: Any, check_training: bool) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: pass a torch.nn.Module, a torch.fx.GraphModule or a "
            "torch.export.ExportedProgram"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("cannot capture a TorchScript module: pass the Python module it was scripted from")
    if not check_training:
        return
    for name, module in model.named_modules():
        if module.training and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            where = f"its submodule {name!r}" if name else "the model"
            raise CaptureError(f"{where} is in training mode: call model.eval() first")


def _check_inputs(args: Any, kwargs: Any) -> None:
    if isinstance(args, Tensor):
        raise CaptureError("args must be a tuple of example inputs: write (x,) rather than x")
    if not isinstance(args, tuple | list):
        raise CaptureError(f"args must be a tuple of example inputs, not {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(f"kwargs must be a dict of example inputs, not {type(kwargs).__name__}")


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


# -- export -------------------------------------------------------------------------------------------------------


def _export(
    model: nn.Module, attempt: Attempt, parameters: inspect.Signature | None, reason: str, earlier: Mapping[str, str]
) -> Program:
    with TRACING:
        try:
            with _quiet_exporter(), torch.no_grad(), attributes_put_back(model), buffers_put_back(model):
                exported = torch.export.export(
                    model, attempt.args, attempt.kwargs, dynamic_shapes=attempt.shapes, strict=False
                )
                program = from_exported(exported)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_explain(model, error, "could not be captured")) from error
    fixed = fixed_sizes(program, exported, reason, earlier)
    program.signature = replace(program.signature, parameters=parameters, fixed=fixed)
    drawn = [f"the model draws random numbers ({each})" for each in random_sites(program)]
    program.notes = (*notes_of(fixed, program.signature.numbers()), *drawn)
    return program


@contextlib.contextmanager
def _quiet_exporter() -> Generator[None]:
    """The exporter warns about each dimension it specialises; the program's signature says that more clearly."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes")
    ]
    loggers += [logging.getLogger("torch._export.non_strict_utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(model: nn.Module, error: BaseException, what: str) -> str:
    """One line: which model, where, why, and what to try."""
    names = {id(module): name for name, module in model.named_modules()}
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule) and id(owner) in names:
            module = names[id(owner)] or type(model).__name__
            file = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
            if "torch/nn/modules/module" not in frame.f_code.co_filename.replace("\\", "/"):
                where = f" in {module} ({file}:{line})"
    reason = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return f"{type(model).__name__} {what}{where}: {reason[:300]} -- {_advice(error)}"


def _advice(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "data-dependent" in text or "guardondatadependent" in text or "unbacked" in text:
        return "the model branches on values of its inputs: move that branch out of forward(), or use torch.where"
    if "pytree" in text or "not a known type" in text:
        return "return tensors in tuples, lists or dicts, or register the class with torch.export.register_dataclass"
    if isinstance(error, TypeError | AttributeError | IndexError | ValueError):
        return "check that model(*args, **kwargs) runs with these example inputs"
    return "check that model(*args, **kwargs) runs, or pass dynamic_shapes=None"
