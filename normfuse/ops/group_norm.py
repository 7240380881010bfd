"""GroupNorm, torch's own: (batch, channels, ...), over a group of channels and all behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Given, Operator, Sizes


def axes(given: Given, sizes: Sizes) -> Sequence[int]:
    """A group of one channel holds none of the axis of channels."""
    return range(2 if given["num_groups"] == sizes[1] else 1, len(sizes))


def function(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias over each group of channels and all axes behind them."""
    return torch.nn.functional.group_norm(x, groups, weight, bias, eps)


OPERATOR = Operator(
    "group_norm",
    role="norm",
    kind="group_norm",
    source="Wu & He 2018, arXiv 1803.08494",
    axes=axes,
    row=False,
    centred=True,
    odd=True,
    homogeneous=True,
    mean_blind=True,
    bounded=True,
    each=5,
    function=function,
)
