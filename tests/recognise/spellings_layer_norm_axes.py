"""LayerNorm over other axes than the last one, over several, per head; gains that depend on an input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, Spelling, gain, rows, shift
from .spellings_layer_norm import layer_norm

HEADS, HEAD = 2, WIDTH // 2


# -- channels first ------------------------------------------------------------------------------------------


class Timm2d(Affine):
    """timm's _layer_norm_cf."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        s, u = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        x = (x - u) * torch.rsqrt(s + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class TimmSquares2d(Affine):
    """timm's _layer_norm_cf_sqm: square of the mean, kept above zero."""

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(dim=1, keepdim=True)
        s = ((x * x).mean(dim=1, keepdim=True) - u * u).clamp(0)
        x = (x - u) * torch.rsqrt(s + self.eps)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class ConvNext(Affine):
    """ConvNeXt's own, SAM's neck: float32 inside a half model."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        input_dtype = x.dtype
        x = x.float()
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        x = x.to(dtype=input_dtype)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class PermuteAround(nn.Module):
    """LayerNorm2d of most vision models: to channels last and back."""

    eps, affine = 1e-6, "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class TokensOfAnImage(Affine):
    """Patch embedding: flattened, transposed, normalised, folded back."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = F.layer_norm(x.flatten(2).transpose(1, 2), (c,), self.weight, self.bias, self.eps)
        return x.reshape(n, h, w, c).permute(0, 3, 1, 2)


class Vits(Affine):
    """VITS, Glow-TTS, RVC: the channel axis of (batch, channels, time) swapped to the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, -1)
        return F.layer_norm(x, (WIDTH,), self.weight, self.bias, self.eps).transpose(1, -1)


class GradTts(Affine):
    """Grad-TTS and Tacotron descendants: written out over axis 1, shaped by the rank of x."""

    eps = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, 1, keepdim=True)
        variance = torch.mean((x - mean) ** 2, 1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.weight.view(*shape) + self.bias.view(*shape)


class LucidrainsChannels(nn.Module):
    """g and b of shape (1, dim, 1, 1)."""

    eps, affine = 1e-5, "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.g, self.b = gain(1, WIDTH, 1, 1), shift(1, WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        var = torch.var(x, dim=1, unbiased=False, keepdim=True)
        mean = torch.mean(x, dim=1, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.g + self.b


class ConstantConvolution(Affine):
    """Means over channels as a 1x1 convolution with constant weights."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.full((1, WIDTH, 1, 1), 1 / WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        d = x - F.conv2d(x, self.average)
        std = (F.conv2d(d * d, self.average) + self.eps).sqrt()
        return d / std * self.weight.reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1)


class FirstAxis(Affine):
    """Time-first speech code: (channels, time)."""

    eps, affine = 1e-5, "weight"

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return x / (x.pow(2).mean(0) + self.eps).sqrt() * self.weight.unsqueeze(1)


# -- several axes --------------------------------------------------------------------------------------------


class WholeImage(nn.Module):
    """LayerNorm over (C, H, W), a gain for each of its elements."""

    eps, affine = 1e-5, "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((6, 3, 5))
        self.norm.eps = self.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class TwoAxesWrittenOut(nn.Module):
    eps, affine = 1e-3, "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = gain(5, WIDTH), shift(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((-2, -1), keepdim=True)
        var = (x - mean).pow(2).mean(dim=(-2, -1), keepdim=True)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class OneAxisAfterTheOther(nn.Module):
    """A mean of means: the same as the mean over both axes."""

    eps, affine = 1e-5, "none"

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True).mean(-2, keepdim=True)
        return d * torch.rsqrt(d.square().mean(-1, keepdim=True).mean(-2, keepdim=True) + self.eps)


class Flattened(nn.Module):
    """Both axes folded into one, normalised, unfolded."""

    eps, affine = 1e-5, "none"

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], -1)
        flat = (flat - flat.mean(1, keepdim=True)) / (
            flat.var(1, keepdim=True, unbiased=False) + self.eps
        ).sqrt()
        return flat.view_as(x)


class PerHead(Affine):
    """xLSTM's multi-head LayerNorm: each head by itself, one gain over all heads."""

    affine = "weight"

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = x.view(b, t, HEADS, HEAD)
        h = (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + self.eps)
        return h.reshape(b, t, c) * self.weight


class KerasFused(Affine):
    """Keras and old Megatron: each row a channel of a batch norm over the present batch."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        rows_as_channels = x.reshape(1, -1, x.shape[-1])
        y = F.batch_norm(rows_as_channels, None, None, training=True, eps=self.eps)
        return y.reshape(x.shape) * self.weight + self.bias


class GroupNormOfRows(Affine):
    """Rows as samples of one group."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.flatten(0, -2), 1, self.weight, self.bias, self.eps).view_as(x)


# -- gains that depend on an input ---------------------------------------------------------------------------


class Modulated(nn.Module):
    """DiT: norm(x) * (1 + scale) + shift, both from the condition."""

    eps, affine = 1e-6, "none"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(7, 2 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        offset, scale = self.modulation(condition).chunk(2, dim=1)
        return self.norm(x) * (1 + scale.unsqueeze(1)) + offset.unsqueeze(1)


class Conditional(nn.Module):
    """Conditional LayerNorm of speech models, written out, gain and shift by two projections."""

    eps, affine = 1e-5, "none"

    def __init__(self) -> None:
        super().__init__()
        self.to_gain, self.to_shift = nn.Linear(7, WIDTH), nn.Linear(7, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        std = ((x - mean) ** 2).mean(dim=-1, keepdim=True).add(self.eps).sqrt()
        y = (x - mean) / std
        y = y * self.to_gain(condition)[:, None]
        return y + self.to_shift(condition)[:, None]


class StyleTts(nn.Module):
    """StyleTTS's AdaLayerNorm: (batch, channels, time), F.layer_norm between transposes."""

    eps, affine = 1e-5, "none"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 2 * WIDTH)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x = x.transpose(-1, -2)
        h = self.fc(s).unsqueeze(1)
        gamma, beta = torch.chunk(h, chunks=2, dim=-1)
        x = F.layer_norm(x, (WIDTH,), eps=self.eps)
        return ((1 + gamma) * x + beta).transpose(-1, -2)


def _image(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], m.norm.weight, m.norm.bias, m.eps)


def _two_axes(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-2:], getattr(m, "weight", None), getattr(m, "bias", None), m.eps)


def _lucidrains(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (WIDTH,), m.g.flatten(), m.b.flatten(), m.eps).movedim(-1, 1)


def _module(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (WIDTH,), m.norm.weight, m.norm.bias, m.eps).movedim(-1, 1)


def _per_head(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.unflatten(-1, (HEADS, HEAD)), (HEAD,), eps=m.eps).flatten(-2) * m.weight


def _modulated(m: Any, x: Tensor, condition: Tensor) -> Tensor:
    offset, scale = m.modulation(condition)[:, None].chunk(2, -1)
    return F.layer_norm(x, (WIDTH,), eps=m.eps) * (1 + scale) + offset


def _conditional(m: Any, x: Tensor, condition: Tensor) -> Tensor:
    return (
        F.layer_norm(x, (WIDTH,), eps=m.eps) * m.to_gain(condition)[:, None] + m.to_shift(condition)[:, None]
    )


def _style(m: Any, x: Tensor, s: Tensor) -> Tensor:
    gamma, beta = m.fc(s)[:, :, None].chunk(2, 1)
    return F.layer_norm(x.mT, (WIDTH,), eps=m.eps).mT * (1 + gamma) + beta


def _channels_first(make: type[nn.Module], **given: Any) -> Spelling:
    said: dict[str, Any] = dict(axes=(-3,), reference=references.on_axis(1, references.layer_norm))
    said |= dict(inputs=lambda: (rows(2, WIDTH, 3, 5),))
    return layer_norm(make, **(said | given))


def _condition() -> tuple[Tensor, ...]:
    return rows(2, 5, WIDTH), torch.randn(2, 7)


SPELLINGS: tuple[Spelling, ...] = (
    _channels_first(Timm2d),
    _channels_first(TimmSquares2d),
    _channels_first(ConvNext, dtype=torch.float16),
    _channels_first(PermuteAround, axes=(-1,), outer_axes=(-3,), reference=_module),
    _channels_first(TokensOfAnImage, axes=(-1,), outer_axes=(-3,)),
    _channels_first(Vits, axes=(-1,), outer_axes=(-2,), inputs=lambda: (rows(2, WIDTH, 5),)),
    _channels_first(GradTts, axes=(-2,), inputs=lambda: (rows(2, WIDTH, 5),)),
    _channels_first(LucidrainsChannels, reference=_lucidrains),
    _channels_first(ConstantConvolution),
    _channels_first(
        FirstAxis,
        axes=(-2,),
        inputs=lambda: (rows(WIDTH, 7),),
        reference=references.on_axis(0, references.layer_norm),
    ),
    layer_norm(WholeImage, axes=(-3, -2, -1), reference=_image, inputs=lambda: (rows(2, 6, 3, 5),)),
    layer_norm(TwoAxesWrittenOut, axes=(-2, -1), reference=_two_axes),
    layer_norm(OneAxisAfterTheOther, axes=(-2, -1), reference=_two_axes),
    layer_norm(Flattened, axes=(-1,), outer_axes=(-2, -1), reference=_two_axes),
    layer_norm(PerHead, or_kinds=("group_norm",), or_affine=("none",), reference=_per_head),
    layer_norm(KerasFused),
    layer_norm(GroupNormOfRows, or_kinds=("group_norm",)),
    layer_norm(Modulated, adaptive=True, reference=_modulated, inputs=_condition),
    layer_norm(Conditional, adaptive=True, reference=_conditional, inputs=_condition),
    layer_norm(
        StyleTts,
        axes=(-1,),
        outer_axes=(-2,),
        adaptive=True,
        reference=_style,
        inputs=lambda: (rows(2, WIDTH, 5), torch.randn(2, 7)),
    ),
)
