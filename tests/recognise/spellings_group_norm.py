"""GroupNorm and InstanceNorm: torch's own, and written out through views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, Spelling, named, rows

GROUPS = 4


class Grouped(Affine):
    groups = GROUPS


# -- groups --------------------------------------------------------------------------------------------------


class Module(nn.Module):
    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, WIDTH, eps=self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class MetaFormer(nn.Module):
    """One group: PoolFormer's and timm's GroupNorm1."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Float32(Grouped):
    """fairseq's Fp32GroupNorm, guided-diffusion's GroupNorm32."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), self.groups, self.weight.float(), self.bias.float(), self.eps)
        return y.type_as(x)


class Paper(Grouped):
    """Wu and He's listing: reshape to (N, G, C/G, H, W), moments over the last three."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        g = x.reshape(n, self.groups, c // self.groups, h, w)
        mean = g.mean(dim=(2, 3, 4), keepdim=True)
        var = g.var(dim=(2, 3, 4), keepdim=True, unbiased=False)
        g = (g - mean) / torch.sqrt(var + self.eps)
        return g.reshape(n, c, h, w) * self.weight.view(1, c, 1, 1) + self.bias.view(1, c, 1, 1)


class FlatGroups(Grouped):
    """(N, G, -1), moments over the last axis."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        shape = x.size()
        x = x.view(shape[0], self.groups, -1)
        var, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        x = ((x - mean) * torch.rsqrt(var + self.eps)).view(shape)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ThroughLayerNorm(Grouped):
    """Each group a row of F.layer_norm, the affine part after."""

    def forward(self, x: Tensor) -> Tensor:
        g = x.reshape(x.shape[0], self.groups, -1)
        y = F.layer_norm(g, g.shape[-1:], eps=self.eps).reshape(x.shape)
        return torch.addcmul(self.bias.view(-1, 1, 1), y, self.weight.view(-1, 1, 1))


class ThroughBatchNorm(Grouped):
    """Each group a channel of F.batch_norm over the present batch, as early ports did."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        y = F.batch_norm(x.reshape(1, b * self.groups, -1), None, None, None, None, True, 0.0, self.eps)
        return y.view_as(x) * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Rwkv(Affine):
    """RWKV and RetNet: heads as groups of a flat batch of tokens."""

    groups, eps = 2, 64e-5

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        return F.group_norm(x.reshape(b * t, c), self.groups, self.weight, self.bias, self.eps).view(b, t, c)


class GlobalLayerNorm(Affine):
    """Conv-TasNet's gLN: over channels and time, a gain for each channel."""

    groups, eps = 1, 1e-8

    def forward(self, y: Tensor) -> Tensor:
        mean = y.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        var = (torch.pow(y - mean, 2)).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        gamma, beta = self.weight.view(1, -1, 1), self.bias.view(1, -1, 1)
        return gamma * (y - mean) / torch.pow(var + self.eps, 0.5) + beta


class ChannelsLast(Grouped):
    """A JAX port: (N, H, W, G, C/G), moments over H, W and the last axis, E[x^2] - E[x]^2."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        g = x.unflatten(-1, (self.groups, -1))
        mean = g.mean(dim=(1, 2, 4), keepdim=True)
        var = (g * g).mean(dim=(1, 2, 4), keepdim=True) - mean * mean
        return ((g - mean) * torch.rsqrt(var + self.eps)).flatten(-2) * self.weight + self.bias


# -- instances -----------------------------------------------------------------------------------------------


class InstanceModule(nn.Module):
    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(WIDTH, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class InstanceFunctional(nn.Module):
    eps = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, eps=self.eps)


class GroupPerChannel(nn.Module):
    """wav2vec2's first layer: as many groups as channels."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class InstanceWrittenOut(Affine):
    """Style transfer and CycleGAN ports."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        var = x.var((2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (var + self.eps).sqrt()
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class InstanceFlat(Affine):
    """Over the flattened picture, by sums."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.view(n, c, h * w)
        flat = flat - flat.sum(-1, keepdim=True) / (h * w)
        inverse = torch.rsqrt(flat.pow(2).sum(-1, keepdim=True) / (h * w) + self.eps)
        return (flat * inverse * self.weight[:, None] + self.bias[:, None]).view(n, c, h, w)


class Spade(nn.Module):
    """A gain and a shift for each pixel, from a map."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(WIDTH)
        self.to_gamma, self.to_beta = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.to_gamma(labels)) + self.to_beta(labels)


class RevIn(Affine):
    """Reversible instance norm of forecasters: over time, each series by itself."""

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, dim=1, keepdim=True).detach()
        stdev = torch.sqrt(torch.var(x, dim=1, keepdim=True, unbiased=False) + self.eps).detach()
        x = x - mean
        x = x / stdev
        return x * self.weight + self.bias


def _module(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, m.norm.num_groups, m.norm.weight, m.norm.bias, m.eps)


def _tokens(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x.flatten(0, 1), 2, m.weight, m.bias, m.eps).view_as(x)


def _channels_last(m: Any, x: Tensor) -> Tensor:
    return references.group_norm(m, x.movedim(-1, 1)).movedim(1, -1)


def _instance_module(m: Any, x: Tensor) -> Tensor:
    return F.instance_norm(x, weight=m.norm.weight, bias=m.norm.bias, eps=m.eps)


def _instance_bare(m: Any, x: Tensor) -> Tensor:
    return F.instance_norm(x, eps=m.eps)


def _spade(m: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.instance_norm(x, eps=m.eps) * (1 + m.to_gamma(labels)) + m.to_beta(labels)


def _revin(m: Any, x: Tensor) -> Tensor:
    return references.instance_norm(m, x.mT).mT


def _image() -> tuple[Tensor, ...]:
    return (rows(2, WIDTH, 3, 5),)


def _gn(make: Callable[[], Any], **given: Any) -> Spelling:
    said: dict[str, Any] = dict(name="group_norm_" + named(make), eps=make.eps, affine="weight+bias")  # type: ignore[attr-defined]
    said |= dict(inputs=_image, reference=references.group_norm, facts={"groups": GROUPS})
    return Spelling(kind="group_norm", make=make, **(said | given))


def _in(make: Callable[[], Any], **given: Any) -> Spelling:
    said: dict[str, Any] = dict(name=named(make), eps=make.eps, axes=(-2, -1), affine="weight+bias")  # type: ignore[attr-defined]
    said |= dict(inputs=_image, reference=references.instance_norm)
    return Spelling(kind="instance_norm", make=make, **(said | given))


SPELLINGS: tuple[Spelling, ...] = (
    _gn(Module, reference=_module),
    _gn(MetaFormer, reference=_module, facts={"groups": 1}),
    _gn(Float32, dtype=torch.float16),
    _gn(Paper),
    _gn(FlatGroups),
    _gn(ThroughLayerNorm, or_kinds=("layer_norm",), or_affine=("none",)),
    _gn(ThroughBatchNorm),
    _gn(Rwkv, reference=_tokens, facts={"groups": 2}, inputs=lambda: (rows(2, 5, WIDTH),)),
    _gn(GlobalLayerNorm, facts={"groups": 1}, inputs=lambda: (rows(2, WIDTH, 5),)),
    _gn(ChannelsLast, reference=_channels_last, inputs=lambda: (rows(2, 3, 5, WIDTH),)),
    _in(InstanceModule, reference=_instance_module),
    _in(InstanceFunctional, affine="none", reference=_instance_bare),
    _in(GroupPerChannel, or_kinds=("group_norm",), reference=_module),
    _in(InstanceWrittenOut),
    _in(InstanceFlat, axes=(-1,), outer_axes=(-2, -1)),
    _in(
        Spade,
        affine="none",
        adaptive=True,
        reference=_spade,
        inputs=lambda: (rows(2, WIDTH, 3, 5), torch.randn(2, 3, 3, 5)),
    ),
    _in(
        RevIn,
        axes=(-2,),
        or_kinds=("layer_norm",),
        or_affine=("none",),
        reference=_revin,
        inputs=lambda: (rows(2, 5, WIDTH),),
    ),
)
