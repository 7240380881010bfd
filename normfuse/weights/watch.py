"""Have weights changed since something was made of them? Asked at every call, so microseconds count.

Four questions, none of which alone sees every way to change a weight: is it the same object, is its data at the same
address, has its version moved, and are a few of its numbers what they were?
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from torch import Tensor

from normfuse.errors import NormfuseError

SAMPLES = 4
"""Numbers of each weight that are compared; a weight with no more than that is compared as a whole."""
_WORD = 4
_address = Tensor.data_ptr


class Watch:
    """The weights as they are now; `same(weights)` says whether these are still they.

    It sees other tensors in their places, other memory (`.data =`, `set_`, `swap_tensors`), every write that torch counts
    (in place, `load_state_dict`, optimizers), and, by `SAMPLES` numbers of each weight, writes that torch does not count
    (through `.data`, numpy, a training forward). It does not see one of the latter that leaves the sampled numbers alone;
    `torch.autograd.graph.increment_version(weight)` tells of it. Without `sampled` no number is looked at. Raises
    `NormfuseError` for a weight without plain memory.
    """

    def __init__(self, weights: Sequence[Tensor], *, sampled: bool = True) -> None:
        if odd := [w for w in weights if not _plain(w)]:
            raise NormfuseError(f"a weight has no plain memory to watch: it is a {type(odd[0]).__name__} ({odd[0].layout})")
        self._weights = tuple(weights)
        self._addresses = list(map(_address, weights))
        self._sampled = sampled
        # A thread of its own: no mode and no hook of the caller's reaches what is made here.
        with ThreadPoolExecutor(1) as apart:
            apart.submit(self._prepare).result()

    def _prepare(self) -> None:
        # Aliases share versions, keep alive the memory that is sampled, and are kept so that none is made at every call.
        self._aliases = aliases = [w.detach() for w in self._weights]
        counted = [a for a in aliases if not a.is_inference()]
        self._result = _Saved.apply(torch.zeros((), requires_grad=True), *counted)  # kept: asking takes half the time
        self._saved: Any = self._result.grad_fn
        looked_at = [a for a in aliases if self._sampled and a.numel()]
        here = [a for a in looked_at if a.device.type == "cpu"]
        away = [a for a in looked_at if a.device.type != "cpu"]
        self._samples = [make(given) for make, given in ((samples_in_memory, here), (samples_of_tensors, away)) if given]

    def unchanged(self) -> bool:
        """Are the very tensors that were given what they were?"""
        return self.same(self._weights)

    def same(self, weights: tuple[Any, ...]) -> bool:
        """Are these the weights that were given, unchanged?"""
        try:
            # Equal tuples compare by identity first; an element that is another tensor of one equal number may pass here,
            # and does no harm: its address is another one.
            if weights != self._weights or list(map(_address, weights)) != self._addresses:
                return False
            _ = self._saved.saved_tensors  # raises if the version of one has moved
        except RuntimeError:
            return False
        return all(same() for same in self._samples)


def _plain(weight: Tensor) -> bool:
    try:
        return weight.layout is torch.strided and (weight.numel() == 0 or _address(weight) != 0)
    except RuntimeError:
        return False


class _Saved(torch.autograd.Function):
    """What is saved for a backward pass is checked for changed versions, all of it in one call."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, *weights: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*weights)
        return start.clone()


def samples_in_memory(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """Compare words of the memory of CPU tensors, gathered in one step; somebody must keep that memory alive."""
    words = sorted({word for t in tensors for word in _words(t)})
    first, last = words[0], words[-1]
    span = (ctypes.c_int32 * ((last - first) // _WORD + 1)).from_address(first)
    memory = numpy.ctypeslib.as_array(span)
    index = (numpy.array(words, dtype=numpy.int64) - first) // _WORD
    now = numpy.empty(len(words), dtype=numpy.int32)

    def gathered() -> bytes:
        memory.take(index, out=now, mode="clip")  # no bounds to check, and no copy that raising would need
        return now.tobytes()

    before = gathered()
    return lambda: gathered() == before


def _words(tensor: Tensor) -> list[int]:
    """Addresses of some words of a tensor; the halves of wider numbers take turns, unless all fit."""
    size = tensor.element_size()
    halves = max(1, size // _WORD)
    parts = tensor.numel() * halves
    found: list[int] = []
    for part in {(parts - 1) * i // max(1, SAMPLES - 1) for i in range(SAMPLES)} if parts > SAMPLES else range(parts):
        rest, half = divmod(part, halves)
        address = _address(tensor) + half * _WORD
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            rest, at = divmod(rest, length)
            address += at * stride * size
        found.append(address - address % _WORD)
    return found


def samples_of_tensors(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """Compare numbers of tensors on any device; where that is not the CPU, the comparison waits for the device."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        span = 1 + sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
        count = min(span, SAMPLES)
        groups.setdefault((t.device, t.dtype), []).append(t.as_strided((count,), ((span - 1) // max(1, count - 1),)))

    def gathered() -> list[Tensor]:
        return [torch.cat(group).view(torch.uint8) for group in groups.values()]  # bytes: NaN is NaN

    before = gathered()
    return lambda: all(map(torch.equal, gathered(), before))


__all__ = ["SAMPLES", "Watch", "samples_in_memory", "samples_of_tensors"]
