"""The RMSNorm of rows of zero mean, of which one number is not stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Operator, affine, count_of, narrowed, widened


def reference(
    z: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * z / sqrt((sum(z**2) + sum(z)**2) / (n + 1) + eps) + bias: an RMSNorm of n + 1 numbers of zero mean.

    The last of them, -sum(z), is not stored.
    """
    wide, over = widened(z), list(axes)
    total = wide.square().sum(over, keepdim=True) + wide.sum(over, keepdim=True).square()
    y = wide * torch.rsqrt(total / (count_of(z, over) + 1) + eps)
    return affine(narrowed(y, z, weight), weight, bias, axes).to(z.dtype)


OPERATOR = Operator(
    "crms_norm",
    "(Tensor z, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor",
    reference,
    role="norm",
    kind="crms_norm",
    source="Jiang et al. 2023, arXiv 2305.14858 eq. 9",
    multiple=True,
    odd=True,
    homogeneous=True,
    bounded=True,
    each=4,
    by_reference=False,
)
CRMS_NORM = OPERATOR.packet
