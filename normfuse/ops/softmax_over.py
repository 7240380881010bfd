"""Softmax along several axes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Operator, widened


def reference(x: Tensor, axes: Sequence[int]) -> Tensor:
    """exp(x) over its sum along several axes at once."""
    wide, over = widened(x), list(axes)
    e = torch.exp(wide - wide.amax(over, keepdim=True))
    return (e / e.sum(over, keepdim=True)).to(x.dtype)


OPERATOR = Operator(
    "softmax_over",
    "(Tensor x, int[] axes) -> Tensor",
    reference,
    role="softmax",
    kind="softmax",
    source="METHODS 3.1",
    gain=None,
    shift=None,
    eps=None,
    mean_blind=True,
    bounded=True,
    sums_to_one=True,
    each=5,
    by_reference=False,
)
SOFTMAX_OVER = OPERATOR.packet
