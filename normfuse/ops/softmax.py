"""Softmax along one axis, torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Given, Operator, Sizes


def one_axis(given: Given, sizes: Sizes) -> Sequence[int]:
    return (given["dim"],)


def function(x: Tensor, *, axis: int = -1) -> Tensor:
    """exp(x) over its sum along one axis."""
    return torch.softmax(x, axis)


OPERATOR = Operator(
    "softmax",
    role="softmax",
    kind="softmax",
    source="METHODS 3.1",
    also=("_softmax",),
    axes=one_axis,
    gain=None,
    shift=None,
    eps=None,
    mean_blind=True,
    bounded=True,
    sums_to_one=True,
    each=5,
    function=function,
)
