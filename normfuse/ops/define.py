"""What the references of our operators share: the library, gains along axes, roots, rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("normfuse", "DEF")


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Sequence[int]) -> Tensor:
    """Gain and shift of shape `[x.shape[a] for a in axes]`, broadcast along the other axes."""
    if weight is not None:
        y = y * _along(weight, y.dim(), axes)
    return y if bias is None else y + _along(bias, y.dim(), axes)


def _along(p: Tensor, ndim: int, axes: Sequence[int]) -> Tensor:
    sizes = iter(p.shape)
    positions = {a % ndim for a in axes}
    return p.reshape([next(sizes) if i in positions else 1 for i in range(ndim)])


def widened(x: Tensor) -> Tensor:
    """Statistics of half precision inputs are taken in float32, as every known implementation does."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def root_of(mean_square: Tensor, eps: float, place: str) -> Tensor:
    if place == "inside":
        return torch.sqrt(mean_square + eps)
    if place == "floor":
        return torch.sqrt(mean_square.clamp_min(eps))
    root = torch.sqrt(mean_square)
    return root + eps if place == "outside" else root.clamp_min(eps)


def narrowed(y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """Rounded to the dtype of `x` before the gain, unless the gain is wider."""
    return y if weight is not None and weight.dtype != x.dtype else y.to(x.dtype)


def count_of(x: Tensor, axes: Sequence[int]) -> Any:
    total: Any = 1
    for axis in axes:
        total = total * x.shape[axis]
    return total
