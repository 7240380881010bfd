"""An ONNX file as a module: torch tensors in and out, and an error in words where file, provider or inputs do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import InputError, LoweringError
from normfuse.graph.conditions import Condition, unmet
from normfuse.lower.onnx.file.names import CONDITIONS
from normfuse.lower.onnx.run.runtime import check_provider, first_line, session_options
from normfuse.lower.onnx.run.session import Session

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


class OnnxFile(nn.Module):
    """A file in onnxruntime: called with the inputs in the file's order or by their names, returns outputs by name.

    Calls from several threads may overlap. Raises `LoweringError` for a file that is missing, cut short or without its
    weights, and for a provider that is not there; a call raises `InputError` for what does not fit.
    """

    def __init__(self, path: str | Path, provider: str = "") -> None:
        super().__init__()
        self.path, self.provider = Path(path), check_provider(provider)
        check_file(self.path)
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(self.path), session_options(), providers=[self.provider])
        except Exception as error:
            raise LoweringError(f"onnxruntime cannot load {self.path}: {first_line(error)}") from error
        self._session = Session(session)
        self._inputs = self._session.inputs
        metadata = session.get_modelmeta().custom_metadata_map
        self._conditions = [Condition(text) for text in json.loads(metadata.get(CONDITIONS, "[]"))]

    def __reduce__(self) -> tuple[Any, ...]:
        return OnnxFile, (self.path, self.provider)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        given = self._given(args, kwargs)
        try:
            results = self._session({name: given[name] for name, _, _ in self._inputs})
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(f"onnxruntime cannot run {self.path.name} on these inputs: {first_line(error)}") from error
        return dict(zip(self._session.outputs, results, strict=True))

    def _given(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name, _, _ in self._inputs]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(names) or set(given) != set(names):
            raise InputError(f"{self.path.name} takes the inputs {', '.join(names)}")
        for name, kind, sizes in self._inputs:
            _check(name, given[name], kind, sizes)
        free = {s: n for name, _, sizes in self._inputs for s, n in zip(sizes, given[name].shape, strict=True)}
        for problem in unmet(tuple(self._conditions), {s: n for s, n in free.items() if isinstance(s, str)}):
            raise InputError(f"{self.path.name}: {problem}")
        return given


def _check(name: str, tensor: Any, kind: str, sizes: tuple[Any, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"input {name!r} must be a tensor, not {type(tensor).__name__}")
    if kind in _DTYPES and tensor.dtype != _DTYPES[kind]:
        raise InputError(f"input {name!r} must be {_DTYPES[kind]}, not {tensor.dtype}")
    fits = tensor.dim() == len(sizes) and all(
        not isinstance(want, int) or want == size for want, size in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        raise InputError(f"input {name!r} must have the sizes {list(sizes)}, not {list(tensor.shape)}")


def check_file(path: Path) -> None:
    """Raises `LoweringError` for a file that is no whole ONNX model, or whose weights are not beside it."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    if not path.is_file():
        raise LoweringError(f"there is no file {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.output or not model.opset_import:
            raise ValueError("no graph")
    except Exception as error:
        raise LoweringError(f"{path} is no ONNX file, or is cut short") from error
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        told = ExternalDataInfo(tensor)
        beside = path.parent / str(told.location)
        if not beside.is_file():
            raise LoweringError(f"the weights of {path} are missing: {beside} is not there")
        if beside.stat().st_size < (told.offset or 0) + (told.length or 0):
            raise LoweringError(f"the weights of {path} are cut short: {beside} has {beside.stat().st_size} bytes")
