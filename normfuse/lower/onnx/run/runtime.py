"""Running a program in onnxruntime: torch tensors in, torch tensors out, weights and results shared rather than copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.errors import LoweringError
from normfuse.graph.program import Program
from normfuse.lower.decisions import CPU, Choice
from normfuse.lower.onnx.file.write import build, check_request
from normfuse.lower.onnx.form import check_tensors, onnx_target
from normfuse.lower.onnx.run.session import Session, to_ort
from normfuse.lower.target import Target, settled
from normfuse.rewrite.record import FiringKey, Log

DEFAULT_PROVIDER = CPU
_SHARED = 1024
"""Bytes from which a weight is handed to onnxruntime by address; smaller ones stand in the file, where it folds them."""


_OLDEST = (1, 23)
"""The onnxruntime that first runs Attention and RMSNormalization of opset 23 on a CPU."""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def check_provider(provider: str = "") -> str:
    """The full name of an execution provider that is installed. Raises `LoweringError` saying which ones are."""
    try:
        import onnxruntime
    except ImportError:
        raise LoweringError("backend 'onnxruntime' needs the package onnxruntime: pip install 'normfuse[onnx]'") from None
    if _version(onnxruntime.__version__) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise LoweringError(
            f"backend 'onnxruntime' needs onnxruntime {oldest} or newer for the operators of opset 23, not "
            f"{onnxruntime.__version__}: pip install -U 'normfuse[onnx]'"
        )
    known = onnxruntime.get_available_providers()
    wanted = (provider or DEFAULT_PROVIDER).lower().removesuffix("executionprovider")
    for name in known:
        if name.lower().removesuffix("executionprovider") == wanted:
            return str(name)
    raise LoweringError(f"onnxruntime has no provider {provider!r} here: choose one of {', '.join(known)}")


class Runtime:
    """A program as an onnxruntime session: flat leaves in, flat leaves out. Calls from several threads may overlap."""

    def __init__(
        self,
        program: Program,
        provider: str = "",
        *,
        lowered: bool = False,
        excluded: frozenset[FiringKey] = frozenset(),
    ) -> None:
        """`lowered`: the program is a baked form already. `excluded`: lowering firings that are known to be wrong."""
        self.provider = check_provider(provider)
        self.choice = Choice("onnxruntime", check_request("onnxruntime", None), self.provider)
        if not lowered:
            check_tensors(program)
            program = settled(onnx_target(self.choice).form(program, Log(excluded=excluded)))
        model = build(program, self.choice)
        self._inputs = [place for place, leaf in enumerate(program.signature.leaves) if leaf.is_tensor]
        self._outputs = result_places(program)
        self.session = Session(self._session(model))
        self._input_names = [name for name, _, _ in self.session.inputs]

    def _session(self, model: Any) -> Any:
        import onnx_ir as ir
        import onnxruntime

        options = session_options()
        names, self._weights = _share_weights(model)  # kept: the session has their addresses alone
        options.add_external_initializers(names, self._weights)
        providers = [self.provider] + ([DEFAULT_PROVIDER] if self.provider != DEFAULT_PROVIDER else [])
        try:
            return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=providers)
        except Exception as error:
            raise LoweringError(f"onnxruntime cannot load the model: {first_line(error)}") from error

    def __call__(self, *leaves: Any) -> Sequence[Any]:
        given = [leaves[place] for place in self._inputs]
        try:
            results = self.session(dict(zip(self._input_names, given, strict=True)))
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(f"onnxruntime cannot run the model on these inputs: {first_line(error)}") from error
        return [item if place is None else results[place] for place, item in self._outputs]


def _share_weights(model: Any) -> tuple[list[str], list[Any]]:
    """Take the weights out of the model: the session reads them where they are."""
    import onnx_ir as ir

    names: list[str] = []
    values: list[Any] = []
    for name, initializer in model.graph.initializers.items():
        weight = initializer.const_value
        raw = getattr(weight, "raw", None)
        if not isinstance(raw, Tensor) or weight.nbytes < _SHARED or not raw.is_contiguous():
            continue
        names.append(name)
        values.append(to_ort(raw))
        initializer.const_value = ir.ExternalTensor(
            "weights", 0, weight.nbytes, weight.dtype, shape=weight.shape, name=name, base_dir=""
        )
    return names, values


def runtime_target(provider: str = "") -> Target:
    """ONNX for onnxruntime on this provider, run in a session."""
    choice = Choice("onnxruntime", check_request("onnxruntime", None), check_provider(provider))
    return replace(onnx_target(choice), executable=lambda form: Runtime(form, choice.provider, lowered=True))


def result_places(program: Program) -> list[tuple[int | None, Any]]:
    """For each output leaf its place among the session's results, or the constant that it is."""
    places: list[tuple[int | None, Any]] = []
    count = 0
    for item in program.output.args[0]:  # type: ignore[union-attr]
        computed = isinstance(item, fx.Node)
        places.append((count, None) if computed else (None, item))
        count += computed
    return places


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def session_options() -> Any:
    """As many threads as torch uses; the runtime's own optimizations on, its complaints off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options
