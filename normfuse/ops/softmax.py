"""Softmax along several axes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import library, widened

library.define("softmax_over(Tensor x, int[] axes) -> Tensor")


def softmax_over(x: Tensor, axes: Sequence[int]) -> Tensor:
    """exp(x) over its sum along several axes at once."""
    wide, over = widened(x), list(axes)
    e = torch.exp(wide - wide.amax(over, keepdim=True))
    return (e / e.sum(over, keepdim=True)).to(x.dtype)


library.impl("softmax_over", softmax_over, "CompositeImplicitAutograd")

SOFTMAX_OVER = torch.ops.normfuse.softmax_over
