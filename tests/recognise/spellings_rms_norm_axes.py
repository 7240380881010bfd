"""RMSNorm: other reductions, other axes, other divisions; and the compressed form of a zero-mean stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, Spelling, gain, named, rows, shift
from .spellings_rms_norm import Gain, rms_norm

# -- the mean square -----------------------------------------------------------------------------------------


class Einsum(Gain):
    def forward(self, x: Tensor) -> Tensor:
        mean_square = torch.einsum("...d,...d->...", x, x) / x.shape[-1]
        return x * torch.rsqrt(mean_square + self.eps).unsqueeze(-1) * self.weight


class MatmulWithOnes(Gain):
    """The mean as a product with a constant column."""

    def forward(self, x: Tensor) -> Tensor:
        average = x.new_full((WIDTH, 1), 1.0 / WIDTH)
        return x / (torch.matmul(x * x, average) + self.eps).sqrt() * self.weight


class OnesMatrix(Gain):
    """The mean already spread to all channels by an all-ones matrix."""

    def forward(self, x: Tensor) -> Tensor:
        spread = F.linear(x.pow(2), torch.ones(WIDTH, WIDTH, dtype=x.dtype)) / WIDTH
        return self.weight * x / torch.sqrt(spread + self.eps)


class VectorNorm(Gain):
    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.sqrt(norm**2 / WIDTH + self.eps) * self.weight


class DotProduct(Gain):
    def forward(self, x: Tensor) -> Tensor:
        square = torch.matmul(x.unsqueeze(-2), x.unsqueeze(-1)).squeeze(-1)
        return x * (square * (1 / WIDTH) + self.eps).pow(-0.5) * self.weight


class SumOverSize(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return x / ((x**2).sum(-1, keepdim=True) / x.size(-1) + self.eps) ** 0.5 * self.weight


class SumTimesN(Gain):
    """sqrt(n) * x / sqrt(sum + n eps): the same function, eps scaled."""

    eps = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return x * WIDTH**0.5 * torch.rsqrt(x.square().sum(-1, True) + WIDTH * self.eps) * self.weight


class WithoutKeepdim(Gain):
    def forward(self, x: Tensor) -> Tensor:
        rms = x.pow(2).mean(dim=-1).add(self.eps).sqrt()
        return x / rms.unsqueeze(-1).expand_as(x) * self.weight


class AveragePool(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return x * (F.avg_pool1d(x.square(), kernel_size=WIDTH) + self.eps).rsqrt() * self.weight


class Reciprocal(Gain):
    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.reciprocal(torch.sqrt(torch.mean(torch.square(x), -1, True) + self.eps))
        return inverse * x * self.weight


class EpsBuffer(Gain):
    epsilon: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.tensor(2.0**-12))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


class NoEps(Gain):
    eps = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).sqrt() * self.weight


class ClampedMeanSquare(Gain):
    """eps as a floor of the mean square."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).clamp(min=self.eps).rsqrt() * self.weight


class BiasOnly(Affine):
    affine = "bias"

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.bias, x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.eps))


class Negated(Gain):
    """Signs that cancel, a division by the reciprocal."""

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.rsqrt((-x).pow(2).mean(-1, keepdim=True) + self.eps)
        return -(-x / (1 / inverse)) * self.weight


# -- axes ----------------------------------------------------------------------------------------------------


class Timm2d(Gain):
    """timm's rms_norm2d, ltx and SANA's RMSNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        v = torch.mean(x.pow(2), dim=1, keepdim=True)
        return x * torch.rsqrt(v + self.eps) * self.weight.reshape(1, -1, 1, 1)


class PixelNorm(nn.Module):
    """StyleGAN, LTX-Video."""

    eps, affine = 1e-8, "none"

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + self.eps)


class FilterResponse(nn.Module):
    """timm's filter response norm: over space, a gain and a shift for each channel."""

    eps, affine = 1e-5, "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = gain(WIDTH), shift(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rms = x.square().float().mean(dim=(2, 3), keepdim=True).add(self.eps).rsqrt().to(x.dtype)
        x = x * rms.expand(x.shape)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class GroupRms(nn.Module):
    """EvoNorm's group_rms as a norm: over a group of channels and space."""

    eps, affine = 1e-5, "none"

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = x.reshape(b, 4, c // 4, h, w)
        rms = g.square().mean(dim=(2, 3, 4), keepdim=True).add(self.eps).sqrt_()
        return x / rms.expand(g.shape).reshape(b, c, h, w)


class QueriesAndKeys(nn.Module):
    """Qwen3: each head of q and of k over its own channels, before the heads are moved forward."""

    eps, affine = 1e-6, "weight"

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(8, eps=self.eps), gain(8)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q_norm(q.view(2, 5, 2, 8)).transpose(1, 2)
        k = k.view(2, 5, 2, 8)
        k = self.k_norm * (k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + self.eps))
        return q, k.transpose(1, 2)


class TransposedInOut(Gain):
    """(batch, channels, time) moved to the end and back, written out in between."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.mT
        h = self.weight * h / torch.sqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return h.mT


class TwoAxes(nn.Module):
    eps, affine = 1e-5, "none"

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-2:], eps=self.eps)


class CompressedSums(nn.Module):
    """CRMSNorm: d - 1 coordinates of a zero-mean vector of d."""

    eps, affine = 1e-5, "none"

    def forward(self, z: Tensor) -> Tensor:
        square = z.pow(2).sum(-1, keepdim=True) + z.sum(-1, keepdim=True).pow(2)
        return z * torch.rsqrt(square / (z.shape[-1] + 1) + self.eps)


class CompressedAppended(nn.Module):
    """The same by putting the last coordinate back first."""

    eps, affine = 1e-6, "none"

    def forward(self, z: Tensor) -> Tensor:
        x = torch.cat([z, -z.sum(-1, keepdim=True)], dim=-1)
        return z / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _buffer(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), m.weight, float(m.epsilon))


def _floor(m: Any, x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(m.eps**0.5) * m.weight


def _bias(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), eps=m.eps) + m.bias


def _pixel(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x.movedim(1, -1), (WIDTH,), eps=m.eps).movedim(-1, 1)


def _filter_response(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[2:], eps=m.eps) * m.weight[:, None, None] + m.bias[:, None, None]


def _group_rms(m: Any, x: Tensor) -> Tensor:
    g = x.unflatten(1, (4, -1))
    return F.rms_norm(g, g.shape[2:], eps=m.eps).flatten(1, 2)


def _queries_and_keys(m: Any, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    heads = q.unflatten(-1, (2, 8)), k.unflatten(-1, (2, 8))
    normed = [F.rms_norm(x, (8,), w, m.eps) for x, w in zip(heads, (m.q_norm.weight, m.k_norm), strict=True)]
    return tuple(x.transpose(1, 2) for x in normed)


def _two_axes(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-2:], eps=m.eps)


def _compressed(m: Any, z: Tensor) -> Tensor:
    x = torch.cat([z, -z.sum(-1, keepdim=True)], -1)
    return F.rms_norm(x, x.shape[-1:], eps=m.eps)[..., :-1]


def _image(make: type[nn.Module], **given: Any) -> Spelling:
    return rms_norm(make, **(dict(axes=(-3,), inputs=lambda: (rows(2, WIDTH, 3, 5),)) | given))


def _crms_norm(make: Any) -> Spelling:
    return Spelling(
        kind="crms_norm",
        name="crms_norm_" + named(make),
        make=make,
        axes=(-1,),
        eps=make.eps,
        inputs=lambda: (rows(2, 5, WIDTH - 1),),
        reference=_compressed,
    )


SPELLINGS: tuple[Spelling, ...] = (
    rms_norm(Einsum),
    rms_norm(MatmulWithOnes),
    rms_norm(OnesMatrix),
    rms_norm(VectorNorm),
    rms_norm(DotProduct),
    rms_norm(SumOverSize),
    rms_norm(SumTimesN),
    rms_norm(WithoutKeepdim),
    rms_norm(AveragePool),
    rms_norm(Reciprocal),
    rms_norm(EpsBuffer, eps=2.0**-12, reference=_buffer),
    rms_norm(NoEps),
    rms_norm(ClampedMeanSquare, eps_place="clamp_inside", reference=_floor),
    rms_norm(BiasOnly, reference=_bias),
    rms_norm(Negated),
    _image(Timm2d, reference=references.on_axis(1, references.rms_norm)),
    _image(PixelNorm, reference=_pixel),
    _image(FilterResponse, axes=(-2, -1), or_affine=("none",), reference=_filter_response),
    _image(GroupRms, axes=(-3, -2, -1), reference=_group_rms),
    rms_norm(
        QueriesAndKeys,
        count=2,
        scaled=(0, 1),
        reference=_queries_and_keys,
        inputs=lambda: (rows(2, 5, WIDTH), rows(2, 5, WIDTH)),
    ),
    rms_norm(
        TransposedInOut,
        outer_axes=(-2,),
        inputs=lambda: (rows(2, WIDTH, 5),),
        reference=references.on_axis(1, references.rms_norm),
    ),
    rms_norm(TwoAxes, axes=(-2, -1), reference=_two_axes),
    _crms_norm(CompressedSums),
    _crms_norm(CompressedAppended),
)
