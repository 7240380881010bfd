"""LayerNorm over trailing axes, torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Given, Operator, Sizes


def trailing(given: Given, sizes: Sizes) -> Sequence[int]:
    """As many as `normalized_shape` has sizes."""
    return range(-len(given["normalized_shape"]), 0)


def function(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, axis: int = -1
) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over one axis."""
    moved = x.movedim(axis, -1)
    return torch.nn.functional.layer_norm(moved, moved.shape[-1:], weight, bias, eps).movedim(-1, axis)


OPERATOR = Operator(
    "layer_norm",
    role="norm",
    kind="layer_norm",
    source="Ba et al. 2016, arXiv 1607.06450",
    axes=trailing,
    centred=True,
    odd=True,
    homogeneous=True,
    mean_blind=True,
    bounded=True,
    each=5,
    function=function,
)
LAYER_NORM = OPERATOR.packet
