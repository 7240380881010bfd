"""DyT: tanh in the place of a norm."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.ops.define import Operator, narrowed, no_axes, widened


def reference(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """weight * tanh(alpha * x) + bias; the parameters broadcast with `x`."""
    y = narrowed(torch.tanh(alpha * widened(x)), x, weight)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


OPERATOR = Operator(
    "dyt",
    "(Tensor x, Tensor alpha, Tensor? weight=None, Tensor? bias=None) -> Tensor",
    reference,
    role="squash",
    kind="dyt",
    source="Zhu et al. 2025, arXiv 2503.10622",
    axes=no_axes,
    eps=None,
    row=False,
    odd=True,
    bounded=True,
    each=2,
    by_reference=False,
)
DYT = OPERATOR.packet
