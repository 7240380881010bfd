"""An onnxruntime session on torch tensors: memory is shared both ways, by the public interface of every version alike."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoweringError

_ELEMENTS = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.uint16: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.uint32: 12,
    torch.uint64: 13,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
    torch.float8_e5m2: 19,
}
"""ONNX's number for each dtype."""
_DTYPES = {number: dtype for dtype, number in _ELEMENTS.items()}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BEYOND_NUMPY = ("bfloat16", "float8")


class Session:
    """An `onnxruntime.InferenceSession` that is called with tensors by name. Calls from several threads may overlap.

    No result shares memory with an input or with the result of another call.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = [(str(i.name), str(i.type), tuple(i.shape)) for i in session.get_inputs()]
        self.outputs = [str(o.name) for o in session.get_outputs()]
        self._numpy = not any(kind in str(o.type) for o in session.get_outputs() for kind in _BEYOND_NUMPY)

    def __call__(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        """Results in the order of the outputs. Raises what onnxruntime raises, `LoweringError` for a dtype it lacks."""
        feeds = {name: to_ort(tensor) for name, tensor in given.items()}
        if self._numpy:  # without a copy too, and without a hundred microseconds that a list of OrtValues takes
            results = [torch.from_numpy(array) for array in self.session.run(self.outputs, feeds)]
        else:
            results = [from_ort(value) for value in self.session.run_with_ort_values(self.outputs, feeds)]
        return _owned(results, given.values())


def _owned(results: Sequence[Tensor], given: Any) -> list[Tensor]:
    """An input that the file returns as it came is copied: the caller may write into what it gets."""
    taken = {tensor.data_ptr() for tensor in given}
    return [result.clone() if result.data_ptr() in taken else result for result in results]


def to_ort(tensor: Tensor) -> Any:
    """A tensor as an OrtValue over the same memory, which it keeps alive (copied if not contiguous).

    Raises `LoweringError` for a dtype that onnxruntime does not have.
    """
    from onnxruntime import OrtValue

    element = _ELEMENTS.get(tensor.dtype)
    if element is None:
        raise LoweringError(f"onnxruntime has no tensors of {tensor.dtype}: cast the input or the weight")
    plain = tensor.detach().contiguous().resolve_neg()
    if hasattr(OrtValue, "from_dlpack") and plain.dtype != torch.bool:
        return OrtValue.from_dlpack(plain)
    # Before 1.26 there is no public way by DLPack, and before 1.32 it takes no booleans.
    words = plain.cpu().view(_WORDS[plain.itemsize])
    return OrtValue.ortvalue_from_numpy_with_onnx_type(words.numpy(), element)


def from_ort(value: Any) -> Tensor:
    """An OrtValue as a tensor over the same memory, which it keeps alive."""
    if value.device_name() != "cpu":
        return torch.from_dlpack(value)
    dtype, shape = _DTYPES[value.element_type()], tuple(value.shape())
    count = value.tensor_size_in_bytes()
    if not count:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * count).from_address(value.data_ptr())
    memory.value_kept = value  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
