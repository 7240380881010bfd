"""Weights that are functions of parameters: weight norm, spectral norm, weight standardization."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .corpus import WIDTH, Spelling, gain, named, rows

IN, OUT, TAPS = WIDTH, 6, 3


# -- weight norm ---------------------------------------------------------------------------------------------


def _hooked(api: Callable[..., Any], module: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both hook functions are deprecated, and everywhere
        hooked: nn.Module = api(module, **options)
    return hooked


def hook_linear() -> nn.Module:
    return _hooked(torch.nn.utils.weight_norm, nn.Linear(IN, OUT))


def hook_convolution() -> nn.Module:
    """HiFi-GAN, EnCodec, TCN."""
    return _hooked(torch.nn.utils.weight_norm, nn.Conv1d(IN, OUT, TAPS, padding=1))


def hook_whole_tensor() -> nn.Module:
    """dim=None: one gain for all of the weight."""
    return _hooked(torch.nn.utils.weight_norm, nn.Linear(IN, OUT), dim=None)


def parametrized_linear() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(IN, OUT))


def parametrized_positional() -> nn.Module:
    """wav2vec2's positional convolution: dim=2, grouped."""
    return parametrizations.weight_norm(nn.Conv1d(IN, IN, TAPS, padding=1, groups=4), name="weight", dim=2)


def parametrized_transposed() -> nn.Module:
    """Vocoders' upsampling: dim 0 is the input channel."""
    return parametrizations.weight_norm(nn.ConvTranspose1d(IN, OUT, 4, 2, padding=1))


class _GainAndDirection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.v = gain(OUT, 1), nn.Parameter(torch.randn(OUT, IN))
        self.bias = nn.Parameter(torch.randn(OUT))


class WrittenOut(_GainAndDirection):
    """Salimans and Kingma's formula."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)


class ThroughNormalize(_GainAndDirection):
    """DINO's last layer, cosine classifiers with a learned length."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (F.normalize(self.v, dim=1) * self.g).t() + self.bias


class SumOfSquares(_GainAndDirection):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.v * (self.g * torch.rsqrt(self.v.pow(2).sum(1, keepdim=True)))
        return F.linear(x, weight, self.bias)


class RescaledOutput(_GainAndDirection):
    """The scale applied to the result: linear(x, v) * g / ||v||."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            F.linear(x, self.v) * (self.g / torch.linalg.vector_norm(self.v, dim=1, keepdim=True)).squeeze(1)
            + self.bias
        )


# -- spectral norm -------------------------------------------------------------------------------------------


def spectral_hook_linear() -> nn.Module:
    return _hooked(torch.nn.utils.spectral_norm, nn.Linear(IN, OUT))


def spectral_hook_convolution() -> nn.Module:
    return _hooked(torch.nn.utils.spectral_norm, nn.Conv1d(IN, OUT, TAPS))


def spectral_parametrized_linear() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(IN, OUT)).eval()


def spectral_parametrized_transposed() -> nn.Module:
    return parametrizations.spectral_norm(nn.ConvTranspose1d(IN, OUT, 4, 2)).eval()


class SpectralWrittenOut(nn.Module):
    """Self-attention GANs: stored u and v, sigma = u' W v."""

    u: Tensor
    v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN, TAPS))
        self.register_buffer("u", F.normalize(torch.randn(OUT), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(IN * TAPS), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight.view(OUT, -1)
        sigma = torch.sum(self.u * (matrix @ self.v))
        return F.conv1d(x, self.weight / sigma)


# -- weight standardization ----------------------------------------------------------------------------------


class _Convolution(nn.Conv2d):
    eps: float

    def __init__(self) -> None:
        super().__init__(IN, OUT, TAPS, padding=1)


class Qiao(_Convolution):
    """The paper's repository: a mean of means, unbiased deviation, eps outside."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + self.eps
        return F.conv2d(x, weight / std.expand_as(weight), self.bias, padding=1)


class BigTransfer(_Convolution):
    """BiT's StdConv2d: biased, eps inside."""

    eps = 1e-10

    def forward(self, x: Tensor) -> Tensor:
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - m) / torch.sqrt(v + self.eps), self.bias, padding=1)


class Timm(_Convolution):
    """timm's StdConv2d: a batch norm of the weight does it."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(
            self.weight
        )
        return F.conv2d(x, weight, self.bias, padding=1)


class TimmScaled(_Convolution):
    """timm's ScaledStdConv2d: a gain for each filter, over sqrt(fan-in), times the activation's constant."""

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.gain = gain(OUT, 1, 1, 1)
        self.scale = 1.7139588594436646 * self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        scale = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=self.eps)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


class DeepMind(_Convolution):
    """NFNets in JAX: rsqrt(max(var * fan_in, 1e-4)) * gain."""

    eps = 1e-4

    def __init__(self) -> None:
        super().__init__()
        self.gain = gain(OUT)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        scale = torch.rsqrt(torch.clamp(var * self.weight[0].numel(), min=self.eps)) * self.gain.view(
            -1, 1, 1, 1
        )
        return F.conv2d(x, self.weight * scale - mean * scale, self.bias, padding=1)


class Lucidrains(_Convolution):
    """Diffusion U-Nets: one eps for each dtype."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        mean, var = w.mean(1, keepdim=True), w.var(1, unbiased=False, keepdim=True)
        normalized = (w - mean) * (var + self.eps).rsqrt()
        return F.conv2d(x, normalized.view_as(self.weight), self.bias, padding=1)


class StandardizedLinear(nn.Module):
    eps = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.layer_norm(self.fc.weight, (IN,), eps=self.eps), self.fc.bias)


# -- references ----------------------------------------------------------------------------------------------


def _apply(m: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(m, nn.Linear):
        return F.linear(x, weight, m.bias)
    if isinstance(m, nn.ConvTranspose1d):
        return F.conv_transpose1d(x, weight, m.bias, m.stride, m.padding)  # type: ignore[arg-type]
    convolve = F.conv1d if weight.ndim == 3 else F.conv2d
    return convolve(x, weight, m.bias, padding=m.padding, groups=m.groups)


def _weight_norm(dim: int | None = 0) -> Callable[..., Tensor]:
    def reference(m: Any, x: Tensor) -> Tensor:
        hooked = hasattr(m, "weight_g")
        g, v = (m.weight_g, m.weight_v) if hooked else m.parametrizations.weight.parameters()
        others = [d for d in range(v.ndim) if d != dim]
        return _apply(m, x, g * v / torch.linalg.vector_norm(v, dim=others, keepdim=dim is not None))

    return reference


def _written_out(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch._weight_norm(m.v, m.g, 0), m.bias)


def _spectral(dim: int = 0) -> Callable[..., Tensor]:
    def reference(m: Any, x: Tensor) -> Tensor:
        hooked = hasattr(m, "weight_orig")
        w = m.weight_orig if hooked else m.parametrizations.weight.original
        u, v = (
            (m.weight_u, m.weight_v)
            if hooked
            else (m.parametrizations.weight[0]._u, m.parametrizations.weight[0]._v)
        )
        return _apply(m, x, w / torch.dot(u, w.movedim(dim, 0).flatten(1) @ v))

    return reference


def _spectral_written_out(m: Any, x: Tensor) -> Tensor:
    return F.conv1d(x, m.weight / torch.einsum("o,of,f->", m.u, m.weight.flatten(1), m.v))


def _standardized(m: Any, x: Tensor) -> Tensor:
    w = F.layer_norm(m.weight, m.weight.shape[1:], eps=m.eps)
    gain_ = m.gain * m.scale if hasattr(m, "scale") else 1.0
    return _apply(m, x, w * gain_)


def _qiao(m: Any, x: Tensor) -> Tensor:
    std, mean = torch.std_mean(m.weight, (1, 2, 3), keepdim=True)
    return _apply(m, x, (m.weight - mean) / (std + m.eps))


def _deepmind(m: Any, x: Tensor) -> Tensor:
    d = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
    root = d.square().sum((1, 2, 3), keepdim=True).clamp_min(m.eps).sqrt()
    return _apply(m, x, d / root * m.gain.view(-1, 1, 1, 1))


def _linear(m: Any, x: Tensor) -> Tensor:
    std, mean = torch.var_mean(m.fc.weight, 1, keepdim=True, correction=0)
    return F.linear(x, (m.fc.weight - mean) / (std + m.eps).sqrt(), m.fc.bias)


def _tokens() -> tuple[Tensor, ...]:
    return (rows(2, 5, IN),)


def _signal() -> tuple[Tensor, ...]:
    return (rows(2, IN, 7),)


def _image() -> tuple[Tensor, ...]:
    return (rows(2, IN, 4, 5),)


def _w(kind: str, make: Callable[[], Any], reference: Callable[..., Tensor], **given: Any) -> Spelling:
    name = named(make) if named(make).startswith("spectral") else f"{kind}_{named(make)}"
    said: dict[str, Any] = dict(inputs=_tokens, eps=getattr(make, "eps", None), magnitudes=(1.0,))
    return Spelling(kind=kind, name=name, make=make, reference=reference, **(said | given))


def _ws(make: Callable[[], Any], reference: Callable[..., Tensor] = _standardized, **given: Any) -> Spelling:
    said: dict[str, Any] = dict(axes=(-3, -2, -1), inputs=_image)
    return _w("weight_standardization", make, reference, **(said | given))


SPELLINGS: tuple[Spelling, ...] = (
    _w("weight_norm", hook_linear, _weight_norm()),
    _w("weight_norm", hook_convolution, _weight_norm(), inputs=_signal),
    _w("weight_norm", hook_whole_tensor, _weight_norm(None)),
    _w("weight_norm", parametrized_linear, _weight_norm()),
    _w("weight_norm", parametrized_positional, _weight_norm(2), inputs=_signal),
    _w("weight_norm", parametrized_transposed, _weight_norm(), inputs=_signal),
    _w("weight_norm", WrittenOut, _written_out),
    _w("weight_norm", ThroughNormalize, _written_out, eps=1e-12, eps_place="clamp", or_kinds=("l2_norm",)),
    _w("weight_norm", SumOfSquares, _written_out),
    _w("weight_norm", RescaledOutput, _written_out, or_kinds=("l2_norm",)),
    _w("spectral_norm", spectral_hook_linear, _spectral()),
    _w("spectral_norm", spectral_hook_convolution, _spectral(), inputs=_signal),
    _w("spectral_norm", spectral_parametrized_linear, _spectral()),
    _w("spectral_norm", spectral_parametrized_transposed, _spectral(1), inputs=_signal),
    _w("spectral_norm", SpectralWrittenOut, _spectral_written_out, inputs=_signal),
    _ws(Qiao, _qiao, ddof=1, eps_place="outside"),
    _ws(BigTransfer),
    _ws(Timm, axes=None),
    _ws(TimmScaled, axes=None, affine="weight", or_affine=("none",)),
    _ws(
        DeepMind,
        _deepmind,
        eps_place="clamp_inside",
        affine="weight",
        or_affine=("none",),
        facts={"fan-in in the root": True},
    ),
    _ws(Lucidrains, axes=(-1,), outer_axes=(-3, -2, -1)),
    _ws(StandardizedLinear, _linear, axes=(-1,), or_kinds=("layer_norm",), inputs=_tokens),
)
