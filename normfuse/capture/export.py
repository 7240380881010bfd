"""Capture: a module, an ExportedProgram or an fx graph becomes a Program.

There is one road: `torch.export` before dispatch. A GraphModule (symbolic trace, Dynamo) is a module like any other and
is retraced; an ExportedProgram is taken as it is. `dynamic_shapes="auto"` lets every dimension vary that varies cheaply:
batch and sequence always, image sizes in purely convolutional networks, and falls back step by step.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from normfuse.capture.canonical import from_exported
from normfuse.capture.shapes import Attempt, Shapes, at_least_two, attempts, auto
from normfuse.errors import CaptureError, InputError
from normfuse.graph.node import is_op
from normfuse.graph.program import Program
from normfuse.graph.signature import bind

_CONVOLUTIONAL_RANK = 4


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Shapes = "auto",
    check_training: bool = True,
    caution: int = 0,
) -> Program:
    """The canonical program of `model` for inference.

    `args` and `kwargs` are example inputs as `torch.export.export` takes them; `dynamic_shapes` as in `optimize`.
    `caution` skips that many of the ways in which `"auto"` would let sizes vary, the freest first.
    Raises `CaptureError` naming the module, the source line and what to try.
    """
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    _check_model(model, check_training)
    _check_inputs(args, kwargs)
    parameters = _signature(model)
    try:
        positional, named = bind(parameters, args, kwargs or {})
    except InputError as error:
        raise CaptureError(f"{type(model).__name__}: {error}") from None
    _support_transformers_caches(model)
    allowed = islice(attempts(model, positional, named, dynamic_shapes, parameters), caution, None)
    program, notes = _first_success(model, allowed)
    program.signature = replace(program.signature, parameters=parameters)
    program.notes = notes
    if dynamic_shapes == "auto" and caution == 0 and _purely_convolutional(program):
        program = _with_free_images(model, positional, named, parameters, program)
    return program


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


def _support_transformers_caches(model: nn.Module) -> None:
    """Transformers returns cache objects; it can describe them to pytree itself, but only when asked."""
    if "transformers" not in sys.modules or not type(model).__module__.startswith("transformers"):
        return
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()


# -- dynamic shapes -----------------------------------------------------------------------------------------------


def _purely_convolutional(program: Program) -> bool:
    """Free image sizes are cheap to export where no window and no attention depends on them."""
    images = any(leaf.is_tensor and len(leaf.sizes) == _CONVOLUTIONAL_RANK for leaf in program.signature.leaves)
    aten = torch.ops.aten
    bound = (aten.roll, aten.scaled_dot_product_attention, aten.matmul, aten.bmm, aten.softmax)
    return images and not any(is_op(node, *bound) for node in program.graph.nodes)


def _with_free_images(model: nn.Module, args: Any, kwargs: Any, parameters: Any, fallback: Program) -> Program:
    two_args, two_kwargs = at_least_two(args, kwargs)
    with contextlib.suppress(CaptureError):
        shapes = auto(model, two_args, two_kwargs, lambda t: range(t.dim()))
        program = _export(model, two_args, two_kwargs, shapes)
        program.signature = replace(program.signature, parameters=parameters)
        return program
    return fallback


# -- export -------------------------------------------------------------------------------------------------------


def _first_success(model: nn.Module, allowed: Iterator[Attempt]) -> tuple[Program, tuple[str, ...]]:
    failure: CaptureError | None = None
    for note, args, kwargs, shapes in allowed:
        try:
            return _export(model, args, kwargs, shapes), ((note,) if note else ())
        except CaptureError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes) -> Program:
    try:
        with warnings.catch_warnings(), _quiet_exporter(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    return from_exported(exported)


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
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(model: nn.Module, error: BaseException) -> str:
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
    return f"{type(model).__name__} could not be captured{where}: {reason[:300]} -- {_advice(error)}"


def _advice(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "data-dependent" in text or "guardondatadependent" in text or "unbacked" in text:
        return "the model branches on values of its inputs: move that branch out of forward(), or use torch.where"
    if "pytree" in text or "not a known type" in text:
        return "return tensors in tuples, lists or dicts, or register the class with torch.export.register_dataclass"
    if isinstance(error, TypeError | AttributeError | IndexError | ValueError):
        return "check that model(*args, **kwargs) runs with these example inputs"
    return "check that model(*args, **kwargs) runs, or pass dynamic_shapes=None"
