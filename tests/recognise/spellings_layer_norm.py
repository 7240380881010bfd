"""LayerNorm over the last axis: torch's own, how the division is written, eps outside the root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, Outputs, Spelling, named, rows


def layer_norm(make: Callable[[], nn.Module], **given: Any) -> Spelling:
    """A record over the last axis, with what the class itself says of eps and parameters."""
    said: dict[str, Any] = dict(axes=(-1,), eps=make.eps, affine=make.affine)  # type: ignore[attr-defined]
    said |= dict(reference=references.layer_norm, inputs=lambda: (rows(2, 5, WIDTH),))
    return Spelling(kind="layer_norm", name="layer_norm_" + named(make), make=make, **(said | given))


# -- torch's own ---------------------------------------------------------------------------------------------


class Module(nn.Module):
    eps, affine = 1e-6, "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ModuleWithoutBias(nn.Module):
    """LayerNorm(bias=False), as in nanoGPT, ModernBERT and Cohere's successors."""

    eps, affine = 1e-5, "weight"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ModuleWithoutAffine(nn.Module):
    """OLMo's LayerNorm, DiT's."""

    eps, affine = 1e-6, "none"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class NanoGpt(Affine):
    """nanoGPT: the shape of the weight is the normalised shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NativeLayerNorm(Affine):
    eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, [x.size(-1)], self.weight, self.bias, self.eps)[0]


class AffineApart(Affine):
    """Normalised by torch, the gain and the shift left to a separate module."""

    eps = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, (WIDTH,), eps=self.eps), self.weight)


class Fairseq(Affine):
    """fairseq's Fp32LayerNorm in a bfloat16 model."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), (WIDTH,), self.weight.float(), self.bias.float(), self.eps)
        return y.type_as(x)


class OnePlusWeight(Affine):
    """Megatron and Nemotron: the gain is stored less one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weight + 1, self.bias, self.eps)


# -- written out: the division -------------------------------------------------------------------------------


class PowMinusHalf(Affine):
    """A Flax port that keeps jnp.power(var + eps, -0.5)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).square().mean(-1, keepdim=True) + self.eps
        return (x - mean) * torch.pow(var, -0.5) * (1 + self.weight) + self.bias


class Reciprocal(Affine):
    affine = "bias"

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        inv = (x.var(-1, keepdim=True, correction=0) + self.eps).sqrt().reciprocal()
        return self.bias + inv * (x - mean)


class InPlace(Affine):
    """Training code written to save memory."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        y /= y.pow(2).mean(-1, keepdim=True).add_(self.eps).sqrt_()
        y *= self.weight
        y += self.bias
        return y


class GainBeforeDivision(Affine):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True).expand_as(x)
        std = (x.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt().expand(x.shape)
        return (x - mean) * self.weight / std + self.bias


class MeanMinusX(Affine):
    def forward(self, x: Tensor) -> Tensor:
        d = x.mean(-1, keepdim=True) - x
        return torch.addcmul(
            self.bias, d * -torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + self.eps), self.weight
        )


class DtypeArgument(Affine):
    """A half model that asks the reductions for float32."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True, dtype=torch.float32)
        d = x - mean
        var = torch.mean(d * d, -1, keepdim=True, dtype=torch.float32)
        return (d * torch.rsqrt(var + self.eps)).type_as(x) * self.weight + self.bias


class Residual(Affine):
    """Post-norm: the sum is normalised, and read again."""

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        h = x + branch
        u = h.mean(-1, keepdim=True)
        return self.weight * (
            (h - u) / torch.sqrt((h - u).pow(2).mean(-1, keepdim=True) + self.eps)
        ) + self.bias, h


class WithStatistics(Affine):
    """Mean and inverse deviation are results too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(-1, keepdim=True)
        rstd = torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)
        return (x - mean) * rstd * self.weight + self.bias, mean, rstd


# -- eps outside -----------------------------------------------------------------------------------------------


class BiasedStdEpsOutside(Affine):
    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        std = x.std(dim=-1, keepdim=True, unbiased=False)
        return torch.mul((x - mean) / (std + self.eps), self.weight) + self.bias


def _module(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), m.norm.weight, m.norm.bias, m.eps)


def _residual(m: Any, x: Tensor, branch: Tensor) -> Outputs:
    return references.layer_norm(m, x + branch), x + branch


def _statistics(m: Any, x: Tensor) -> Outputs:
    return torch.native_layer_norm(x, [WIDTH], m.weight, m.bias, m.eps)


def _biased_outside(m: Any, x: Tensor) -> Tensor:
    return references.standardized(m, x, outside=True)


SPELLINGS: tuple[Spelling, ...] = (
    layer_norm(Module, reference=_module),
    layer_norm(ModuleWithoutBias, reference=_module),
    layer_norm(ModuleWithoutAffine, reference=_module),
    layer_norm(NanoGpt),
    layer_norm(NativeLayerNorm),
    layer_norm(AffineApart),
    layer_norm(Fairseq, dtype=torch.bfloat16),
    layer_norm(OnePlusWeight, reference=references.layer_norm_one_plus),
    layer_norm(PowMinusHalf, reference=references.layer_norm_one_plus),
    layer_norm(Reciprocal),
    layer_norm(InPlace),
    layer_norm(GainBeforeDivision),
    layer_norm(MeanMinusX),
    layer_norm(DtypeArgument, dtype=torch.float16),
    layer_norm(
        Residual, reference=_residual, inputs=lambda: (rows(2, 5, WIDTH), rows(2, 5, WIDTH)), scaled=(0, 1)
    ),
    layer_norm(WithStatistics, reference=_statistics),
    layer_norm(BiasedStdEpsOutside, reference=_biased_outside, eps_place="outside"),
)
