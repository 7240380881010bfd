"""The logarithm of a softmax along one axis, torch's own; it counts as one."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.ops.define import Operator
from normfuse.ops.softmax import one_axis


def function(x: Tensor, *, axis: int = -1) -> Tensor:
    """x less the logarithm of the sum of exp(x) along one axis."""
    return torch.log_softmax(x, axis)


OPERATOR = Operator(
    "log_softmax",
    role="softmax",
    kind="softmax",
    source="METHODS 3.1",
    axes=one_axis,
    gain=None,
    shift=None,
    eps=None,
    mean_blind=True,
    each=5,
    function=function,
)
