"""InstanceNorm, torch's own: (batch, channels, ...), over all behind a channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Given, Operator, Sizes


def axes(given: Given, sizes: Sizes) -> Sequence[int]:
    return range(2, len(sizes))


def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias over all axes behind each channel."""
    return torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=eps)


OPERATOR = Operator(
    "instance_norm",
    role="norm",
    kind="instance_norm",
    source="Ulyanov et al. 2016, arXiv 1607.08022",
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
