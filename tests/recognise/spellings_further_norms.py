"""Norms as they stand in further code: flax, detectron2, lucidrains, diffusers, Conv-TasNet, StyleGAN, Mamba 2, Gemma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, Reference, Spelling, gain, named, rows, shift

EPS = 1e-6


class FlaxLayerNorm(Affine):
    """E[x^2] - E[x]^2, kept from falling below zero; the gain in the reciprocal root."""

    eps = EPS

    def forward(self, x: Tensor) -> Tensor:
        mean, mean2 = x.mean(-1, keepdim=True), torch.square(x).mean(-1, keepdim=True)
        scale = torch.rsqrt(torch.clamp(mean2 - torch.square(mean), min=0.0) + self.eps) * self.weight
        return (x - mean) * scale + self.bias


class FlaxRms(Affine):
    affine, eps = "weight", EPS

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        square = torch.einsum("...d,...d->...", y, y)[..., None] / y.shape[-1]
        return (y * torch.rsqrt(square + self.eps)).to(x.dtype) * self.weight


class GemmaHalf(Affine):
    """The float32 upcast holds the gain too."""

    affine, eps = "weight", EPS

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class DetectronChannelsFirst(Affine):
    eps = EPS

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + self.eps)) + self.bias[:, None, None]


class LucidrainsChannels(nn.Module):
    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.g = gain(1, WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-3
        variance, mean = torch.var(x, dim=1, unbiased=False, keepdim=True), torch.mean(x, dim=1, keepdim=True)
        return (x - mean) * (variance + eps).rsqrt() * self.g


class LucidrainsAdaptive(nn.Module):
    """F.normalize, the root of the width, and a gain that is projected from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.to_gamma = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * WIDTH**0.5 * (self.to_gamma(condition)[:, None] + 1.0)


class AdaLayerNormZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        move, scale, gate = self.linear(F.silu(condition)).chunk(3, dim=1)
        mean = x.mean(-1, keepdim=True)
        y = (x - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + EPS)
        return (y * (1 + scale[:, None]) + move[:, None]) * gate.unsqueeze(1)


class PixelNorm(nn.Module):
    eps = 1e-8

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + self.eps)


class GlobalLayerNorm(nn.Module):
    """Conv-TasNet: the mean of means."""

    eps, groups = 1e-8, 1

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = gain(1, WIDTH, 1), shift(1, WIDTH, 1)

    def forward(self, y: Tensor) -> Tensor:
        mean = y.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        variance = torch.pow(y - mean, 2).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        return self.gamma * (y - mean) / torch.pow(variance + self.eps, 0.5) + self.beta


class GatedGroups(nn.Module):
    """Mamba 2: gated first, then each group of channels by itself."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.weight = gain(WIDTH)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = x * F.silu(z.float()).to(x.dtype)
        parts = x.unflatten(-1, (2, -1))
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * parts.flatten(-2)


class GroupsByReshape(nn.Module):
    eps, groups = EPS, 4

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = gain(WIDTH), shift(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, self.groups, c // self.groups, h, w)
        variance, mean = torch.var_mean(y, dim=(2, 3, 4), unbiased=False, keepdim=True)
        y = ((y - mean) * torch.rsqrt(variance + self.eps)).reshape(n, c, h, w)
        return y * self.weight[None, :, None, None] + self.bias[None, :, None, None]


class GroupsChannelsLast(nn.Module):
    eps, groups = EPS, 4

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = gain(WIDTH), shift(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        y = x.reshape(n, h, w, self.groups, c // self.groups)
        mean = y.mean((1, 2, 4), keepdim=True)
        variance = ((y - mean) ** 2).mean((1, 2, 4), keepdim=True)
        return ((y - mean) / torch.sqrt(variance + self.eps)).reshape(n, h, w, c) * self.weight + self.bias


class TwoAxes(nn.Module):
    """Gains for each place of two axes: a LayerNorm of both, not an InstanceNorm."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = gain(4, 8), shift(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean((-2, -1), keepdim=True), x.var((-2, -1), keepdim=True, unbiased=False)
        return self.weight * ((x - mean) * (variance + self.eps) ** -0.5) + self.bias


class MeanByOnes(Affine):
    """Both means as products with a constant matrix."""

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.full((WIDTH, WIDTH), 1 / WIDTH, dtype=x.dtype)
        mean = x @ ones
        return (x - mean) / torch.sqrt(((x - mean) * (x - mean)) @ ones + self.eps) * self.weight + self.bias


class LengthOfCentred(Affine):
    """h sqrt(d) / sqrt(|h|^2 + d eps)"""

    def forward(self, x: Tensor) -> Tensor:
        h = x - x.mean(-1, keepdim=True)
        length = h.norm(2, dim=-1, keepdim=True)
        return h * WIDTH**0.5 / (length**2 + WIDTH * self.eps) ** 0.5 * self.weight + self.bias


class RowTimesColumn(Affine):
    affine, eps = "weight", EPS

    def forward(self, x: Tensor) -> Tensor:
        square = (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1) / WIDTH
        return x * self.weight / torch.sqrt(square + self.eps)


class Latents(nn.Module):
    """A resampler's queries: a parameter, normalised by hand and projected as an input would be."""

    eps = EPS

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.weight = shift(4, WIDTH), gain(WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.latents.unsqueeze(0).expand(x.shape[0], 4, WIDTH)
        h = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps))
        return self.project(h) + x.mean(1, keepdim=True)


# -- references ----------------------------------------------------------------------------------------------


def _adaptive(m: Any, x: Tensor, condition: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * WIDTH**0.5 * (1 + m.to_gamma(condition)[:, None])


def _zero(m: Any, x: Tensor, condition: Tensor) -> Tensor:
    move, scale, gate = m.linear(F.silu(condition)).chunk(3, dim=1)
    return (F.layer_norm(x, (WIDTH,), eps=EPS) * (1 + scale[:, None]) + move[:, None]) * gate[:, None]


def _channels(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (WIDTH,), m.g.flatten(), None, m.eps).movedim(-1, 1)


def _pixel(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x.movedim(1, -1), (WIDTH,), None, m.eps).movedim(-1, 1)


def _global(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, 1, m.gamma.flatten(), m.beta.flatten(), m.eps)


def _gated(m: Any, x: Tensor, z: Tensor) -> Tensor:
    parts = (x * F.silu(z)).unflatten(-1, (2, -1))
    return m.weight * F.rms_norm(parts, parts.shape[-1:], None, m.eps).flatten(-2)


def _last(m: Any, x: Tensor) -> Tensor:
    return references.group_norm(m, x.movedim(-1, 1)).movedim(1, -1)


def _two(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (4, 8), m.weight, m.bias, m.eps)


def _latents(m: Any, x: Tensor) -> Tensor:
    h = F.rms_norm(m.latents, (WIDTH,), m.weight, m.eps).expand(x.shape[0], -1, -1)
    return m.project(h) + x.mean(1, keepdim=True)


def of(make: Callable[[], nn.Module], kind: str, reference: Reference, **given: Any) -> Spelling:
    said: dict[str, Any] = {"inputs": lambda: (rows(2, 5, WIDTH),), "axes": (-1,), "affine": "weight"}
    eps = getattr(make, "eps", None)
    return Spelling(name=f"further_{named(make)}", make=make, kind=kind, reference=reference, eps=eps, **(said | given))


BOTH: dict[str, Any] = {"affine": "weight+bias"}
FREE: dict[str, Any] = {"affine": "none", "adaptive": True}
IMAGE: dict[str, Any] = {"inputs": lambda: (rows(2, WIDTH, 4, 6),), "axes": (-3,), "outer_axes": (-3,)}


def _conditioned() -> tuple[Tensor, ...]:
    return rows(2, 5, WIDTH), torch.randn(2, 8)


SPELLINGS: tuple[Spelling, ...] = (
    of(FlaxLayerNorm, "layer_norm", references.layer_norm, **BOTH),
    of(FlaxRms, "rms_norm", references.rms_norm, dtype=torch.bfloat16),
    of(GemmaHalf, "rms_norm", references.rms_norm_one_plus, dtype=torch.bfloat16),
    of(DetectronChannelsFirst, "layer_norm", references.on_axis(1, references.layer_norm), **(BOTH | IMAGE)),
    of(LucidrainsChannels, "layer_norm", _channels, **IMAGE),
    of(LucidrainsAdaptive, "rms_norm", _adaptive, or_kinds=("l2_norm",), inputs=_conditioned, **FREE),
    of(AdaLayerNormZero, "layer_norm", _zero, inputs=_conditioned, **FREE),
    of(PixelNorm, "rms_norm", _pixel, **(IMAGE | {"affine": "none"})),
    of(GlobalLayerNorm, "group_norm", _global, **(BOTH | {"inputs": lambda: (rows(2, WIDTH, 7),), "axes": (-2, -1)})),
    of(GatedGroups, "rms_norm", _gated, inputs=lambda: (rows(2, 5, WIDTH), rows(2, 5, WIDTH)),
       or_affine=("none", "weight")),
    of(GroupsByReshape, "group_norm", references.group_norm,
       **(BOTH | {"inputs": lambda: (rows(2, WIDTH, 4, 6),), "axes": (-3, -2, -1)})),
    of(GroupsChannelsLast, "group_norm", _last,
       **(BOTH | {"inputs": lambda: (rows(2, 4, 6, WIDTH),), "axes": (-3, -2, -1)})),
    of(TwoAxes, "layer_norm", _two, **(BOTH | {"inputs": lambda: (rows(2, 5, 4, 8),), "axes": (-2, -1)})),
    of(MeanByOnes, "layer_norm", references.layer_norm, **BOTH),
    of(LengthOfCentred, "layer_norm", references.layer_norm, **BOTH),
    of(RowTimesColumn, "rms_norm", references.rms_norm),
    of(Latents, "rms_norm", _latents),
)  # fmt: skip
