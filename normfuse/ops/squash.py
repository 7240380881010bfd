"""Squashing functions in the place of norms: DyT and Derf."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.ops.define import library, narrowed, widened

library.define("dyt(Tensor x, Tensor alpha, Tensor? weight=None, Tensor? bias=None) -> Tensor")


def dyt(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """weight * tanh(alpha * x) + bias; the parameters broadcast with `x`. Zhu et al. 2025 (arXiv 2503.10622)."""
    y = narrowed(torch.tanh(alpha * widened(x)), x, weight)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


library.define("derf(Tensor x, Tensor alpha, Tensor? shift=None, Tensor? weight=None, Tensor? bias=None) -> Tensor")


def derf(
    x: Tensor, alpha: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """weight * erf(alpha * x + shift) + bias; the parameters broadcast with `x`."""
    inner = alpha * widened(x)
    y = narrowed(torch.erf(inner if shift is None else inner + shift), x, weight)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


for _reference in (dyt, derf):
    library.impl(_reference.__name__, _reference, "CompositeImplicitAutograd")

DYT = torch.ops.normfuse.dyt
DERF = torch.ops.normfuse.derf
