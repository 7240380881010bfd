"""RMSNorm as a module, with the shift that a converted LayerNorm keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x**2) + eps) + bias over the last axes of `x`, which have the sizes `normalized_shape`.

    Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4. `torch.nn.RMSNorm` has no bias.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape = sizes
        self.eps = eps
        weight = nn.Parameter(torch.ones(sizes, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", nn.Parameter(torch.zeros(sizes, device=device, dtype=dtype)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        weight, bias = self.weight is not None, self.bias is not None
        return f"{self.normalized_shape}, eps={self.eps}, weight={weight}, bias={bias}"
