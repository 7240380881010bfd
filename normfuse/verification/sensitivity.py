"""Backward error: what the outputs owe to the rounding of the weights themselves.

A weight stands for every number that rounds to it. A rewrite rounds other weights than the original does, so the
original may be luckier on one machine or one input than any rewrite of it: how far the outputs move when each weight
moves by half a unit in its last place says how much luck there is.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.float64 import run_float64
from normfuse.evaluate.rows import Weights
from normfuse.graph.program import Program
from normfuse.verification.numerics import Mismatch, output_error

_SEED = 20_240_229
_ODD = 0x27D4EB2F165667C5  # odd, so that multiplying by it modulo 2^64 loses nothing
_FEW = 1 << 18  # numbers moved at a time


def sensitivity(captured: Program, inputs: Sequence[Sequence[Any]], reference64: Sequence[Sequence[Any]]) -> list[float]:
    """Relative change of each output in float64 when every weight of the program moves by half a unit in its last place.

    0 where that says nothing: an output of integers, or one whose NaN and infinities move with the weights.
    """
    moved = run_float64(captured, inputs, weights=_Moved(captured))
    return [_change(moved, reference64, place) for place in range(len(reference64[0]))]


def _change(moved: Sequence[Sequence[Any]], reference64: Sequence[Sequence[Any]], place: int) -> float:
    try:
        return output_error(moved, reference64, place)
    except Mismatch:
        return 0.0


class _Moved(Weights):
    """Parameters and statistics half a unit in the last place of their own dtype away, up or down by their place.

    The direction is a function of where a number stands in its tensor: every reader of a tied weight, whole or by rows,
    sees the same. Whole numbers in buffers (masks, tables of positions) and literals are no roundings, and stay.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._origins = program.origins

    def _leaf(self, node: fx.Node) -> Any:
        return self._moved(str(node.target), slice(None))

    def rows(self, node: fx.Node, which: Any) -> Tensor:
        return self._moved(str(node.target), which) if node.op == "get_attr" else super().rows(node, which)

    def _moved(self, name: str, which: Any) -> Tensor:
        tensor = self.tensors[name].detach()
        tensor = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
        wide = self._promote(tensor[which])
        if self._origins[name].kind != "constant" and wide.dtype != tensor.dtype:  # float64 leaves nothing to judge by
            places = torch.arange(len(tensor), device=tensor.device)[which]
            _move(wide := wide.contiguous(), places, torch.finfo(tensor.dtype), name, self._origins[name].kind == "buffer")
        return wide.squeeze(0) if self.tensors[name].dim() == 0 else wide


def _move(wide: Tensor, places: Tensor, dtype: torch.finfo, name: str, buffer: bool) -> None:
    """Move rows of a tensor, at these places of it, in blocks of numbers: no second copy of a large one comes into being."""
    flat = torch.view_as_real(wide).view(-1) if wide.is_complex() else wide.view(-1)
    width = max(1, flat.numel() // max(1, len(places)))
    salt = zlib.crc32(name.encode()) + _SEED
    for start in range(0, flat.numel(), _FEW):
        block = flat[start : start + _FEW]
        here = torch.arange(start, start + len(block), device=flat.device)
        up = _coin(places[here // width] * width + here % width + salt)
        half = torch.ldexp(torch.full_like(block, dtype.eps / 4), torch.frexp(block).exponent)
        half.clamp_(min=dtype.smallest_normal * dtype.eps / 2)
        rounded = torch.isfinite(block) & (block != 0)
        rounded = rounded & (block != block.round()) if buffer else rounded
        block += torch.where(rounded, torch.where(up, half, -half), 0.0)


def _coin(numbers: Tensor) -> Tensor:
    """A fair coin for each whole number, the same for the same number."""
    mixed = (numbers * _ODD) ^ ((numbers * _ODD) >> 29)
    mixed = mixed * _ODD
    return ((mixed >> 40) & 1).bool()
