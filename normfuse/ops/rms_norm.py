"""RMSNorm over any axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.ops.define import Operator, affine, narrowed, widened
from normfuse.ops.layer_norm import trailing


def reference(
    x: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * x / sqrt(mean(x**2, axes) + eps) + bias, over ascending negative `axes`; same shape and dtype as `x`."""
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(list(axes), keepdim=True) + eps)
    return affine(narrowed(y, x, weight), weight, bias, axes).to(x.dtype)


OPERATOR = Operator(
    "rms_norm",
    "(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor",
    reference,
    role="norm",
    kind="rms_norm",
    source="Zhang & Sennrich 2019, arXiv 1910.07467 eq. 4",
    multiple=True,
    odd=True,
    homogeneous=True,
    bounded=True,
    each=3,
    by_reference=False,
)
OF_TORCH = Operator(
    "rms_norm",
    role="norm",
    kind="rms_norm",
    source=OPERATOR.source,
    canonical=False,
    axes=trailing,
    shift=None,
    multiple=True,
    odd=True,
    homogeneous=True,
    bounded=True,
    each=3,
)
"""Over trailing axes, without a shift."""
RMS_NORM = OPERATOR.packet
