"""Derf: the error function in the place of a norm."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.ops.define import Operator, narrowed, no_axes, widened


def reference(
    x: Tensor, alpha: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """weight * erf(alpha * x + shift) + bias; the parameters broadcast with `x`."""
    inner = alpha * widened(x)
    y = narrowed(torch.erf(inner if shift is None else inner + shift), x, weight)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


OPERATOR = Operator(
    "derf",
    "(Tensor x, Tensor alpha, Tensor? shift=None, Tensor? weight=None, Tensor? bias=None) -> Tensor",
    reference,
    role="squash",
    kind="derf",
    source="arXiv 2512.10938",
    axes=no_axes,
    eps=None,
    row=False,
    bounded=True,
    each=3,
    factors=("shift", "weight", "bias"),
    by_reference=False,
)
DERF = OPERATOR.packet
