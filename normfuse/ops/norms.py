"""Operators that torch lacks, in the namespace `torch.ops.normfuse`.

Each has a schema, a reference made of aten operators (which also gives shapes, fake tensors and gradients) and says in
its docstring what it computes. Canonical graphs use them so that every later pass sees one spelling of each thing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import affine, count_of, library, narrowed, root_of, widened

library.define("rms_norm(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor")


def rms_norm(
    x: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * x / sqrt(mean(x**2, axes) + eps) + bias, over ascending negative `axes`; same shape and dtype as `x`.

    Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(list(axes), keepdim=True) + eps)
    return affine(narrowed(y, x, weight), weight, bias, axes).to(x.dtype)


library.define(
    "standardize(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps, str place='inside', "
    "bool centre=True, int ddof=0) -> Tensor"
)


def standardize(
    x: Tensor,
    axes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    place: str = "inside",
    centre: bool = True,
    ddof: int = 0,
) -> Tensor:
    """weight * d / root(sum(d**2, axes) / (n - ddof)) + bias, where d is x, less its mean if `centre`.

    The norms that torch's operators cannot say: `eps` stands `"inside"` the root, `"outside"` of it (added to it), or is
    its floor (`"clamp"`) or that of the mean square below it (`"floor"`); the variance may be unbiased (`ddof` 1).
    """
    wide, over = widened(x), list(axes)
    d = wide - wide.mean(over, keepdim=True) if centre else wide
    mean_square = d.square().sum(over, keepdim=True) / (count_of(x, over) - ddof)
    return affine(narrowed(d / root_of(mean_square, eps, place), x, weight), weight, bias, axes).to(x.dtype)


library.define("l2_norm(Tensor x, int[] axes, *, float eps, str place='clamp') -> Tensor")


def l2_norm(x: Tensor, axes: Sequence[int], *, eps: float, place: str = "clamp") -> Tensor:
    """x / root(sum(x**2, axes)); `eps` stands inside the root, outside of it, or is its floor (`"clamp"`, F.normalize).

    With `"floor"` it is the floor of the sum of squares.
    """
    wide = widened(x)
    return (wide / root_of(wide.square().sum(list(axes), keepdim=True), eps, place)).to(x.dtype)


library.define("crms_norm(Tensor z, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor")


def crms_norm(
    z: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * z / sqrt((sum(z**2) + sum(z)**2) / (n + 1) + eps) + bias: an RMSNorm of n + 1 numbers of zero mean.

    The last of them, -sum(z), is not stored. Jiang et al. 2023 (arXiv 2305.14858), eq. 9.
    """
    wide, over = widened(z), list(axes)
    total = wide.square().sum(over, keepdim=True) + wide.sum(over, keepdim=True).square()
    y = wide * torch.rsqrt(total / (count_of(z, over) + 1) + eps)
    return affine(narrowed(y, z, weight), weight, bias, axes).to(z.dtype)


for _reference in (rms_norm, standardize, l2_norm, crms_norm):
    library.impl(_reference.__name__, _reference, "CompositeImplicitAutograd")

RMS_NORM = torch.ops.normfuse.rms_norm
STANDARDIZE = torch.ops.normfuse.standardize
L2_NORM = torch.ops.normfuse.l2_norm
CRMS_NORM = torch.ops.normfuse.crms_norm
