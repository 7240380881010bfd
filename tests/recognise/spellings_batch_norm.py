"""BatchNorm with frozen statistics: torch's own in eval mode, and ways of writing the constants out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Spelling, gain, named, rows, shift


class Frozen(nn.Module):
    """Statistics as buffers, gain and shift as buffers too, as detection code keeps them."""

    eps: float = 1e-5
    affine = "weight+bias"
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", gain(WIDTH).data)
        self.register_buffer("bias", shift(WIDTH).data)
        self.register_buffer("running_mean", torch.randn(WIDTH))
        self.register_buffer("running_var", 0.3 + 2 * torch.rand(WIDTH))


# -- torch's own ---------------------------------------------------------------------------------------------


class _Module(nn.Module):
    eps = 1e-3

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def module_1d() -> nn.Module:
    return _Module(nn.BatchNorm1d(WIDTH, eps=1e-3))


def module_2d() -> nn.Module:
    return _Module(nn.BatchNorm2d(WIDTH, eps=1e-3))


def module_3d() -> nn.Module:
    return _Module(nn.BatchNorm3d(WIDTH, eps=1e-3))


def module_without_affine() -> nn.Module:
    return _Module(nn.BatchNorm2d(WIDTH, eps=1e-3, affine=False))


class Functional(Frozen):
    """training=False whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class AfterConvolution(nn.Module):
    """Conv, BN, ReLU: the statistics are of the convolution's result."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class InstanceNormWithStatistics(nn.Module):
    """InstanceNorm that tracks statistics is, in eval mode, a BatchNorm."""

    eps = 1e-4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(WIDTH, eps=self.eps, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class TokensTransposed(nn.Module):
    """PatchTST, LeViT: tokens through BatchNorm1d."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class TokensFlattened(nn.Module):
    """timm's LeViT: tokens as a batch."""

    eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).reshape_as(x)


# -- written out ---------------------------------------------------------------------------------------------


class Detr(Frozen):
    """FrozenBatchNorm2d of DETR, torchvision and timm."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


class Detectron(Frozen):
    """maskrcnn-benchmark and detectron2: scale and shift of C numbers, viewed last."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + bias.view(1, -1, 1, 1).to(x.dtype)


class Textbook(Frozen):
    eps = 1e-4

    def forward(self, x: Tensor) -> Tensor:
        x_hat = (x - self.running_mean[None, :, None, None]) / torch.sqrt(self.running_var + self.eps)[
            :, None, None
        ]
        return self.weight[:, None, None] * x_hat + self.bias[:, None, None]


class TextbookHalf(Textbook):
    """The same in a float16 model, the arithmetic in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class DivisionLast(Frozen):
    """Gain applied to the difference, the deviation divided out after."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        y = (x - self.running_mean.view(shape)) * self.weight.view(shape)
        return y / (self.running_var.view(shape) + self.eps) ** 0.5 + self.bias.view(shape)


class ChannelsLast(Frozen):
    """(batch, time, channels): no reshaping at all."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.rsqrt(self.running_var + self.eps)
        return torch.addcmul(self.bias, (x - self.running_mean) * inverse, self.weight)


class WithoutAffine(Frozen):
    affine = "none"

    def forward(self, x: Tensor) -> Tensor:
        std = (self.running_var + self.eps).sqrt().reshape(1, -1, 1, 1).expand_as(x)
        return (x - self.running_mean.reshape(1, -1, 1, 1).expand_as(x)) / std


class Haiku(Frozen):
    """hk.BatchNorm ported: the gain into the inverse deviation, NHWC."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        inv = torch.pow(self.running_var + self.eps, -0.5) * self.weight
        return ((x - self.running_mean) * inv + self.bias).permute(0, 3, 1, 2)


def _module(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


def _convolved(m: Any, x: Tensor) -> Tensor:
    return F.relu(_module(m, F.conv2d(x, m.conv.weight)))


def _tokens(m: Any, x: Tensor) -> Tensor:
    return _module(m, x.mT).mT


def _bare(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)


def _last(m: Any, x: Tensor) -> Tensor:
    return references.batch_norm(m, x.mT).mT


def _bn(make: Callable[[], Any], **given: Any) -> Spelling:
    eps = getattr(make, "eps", _Module.eps)
    said: dict[str, Any] = dict(name="batch_norm_" + named(make), eps=eps, affine="weight+bias")
    said |= dict(inputs=lambda: (rows(2, WIDTH, 3, 5),), reference=references.batch_norm)
    return Spelling(kind="batch_norm", make=make, **(said | given))


def _volume() -> tuple[Tensor, ...]:
    return (rows(2, WIDTH, 2, 3, 2),)


def _time_last() -> tuple[Tensor, ...]:
    return (rows(2, 5, WIDTH),)


SPELLINGS: tuple[Spelling, ...] = (
    _bn(module_1d, reference=_module, inputs=lambda: (rows(7, WIDTH),)),
    _bn(module_2d, reference=_module),
    _bn(module_3d, reference=_module, inputs=_volume),
    _bn(module_without_affine, reference=_module, affine="none"),
    _bn(Functional),
    _bn(AfterConvolution, reference=_convolved),
    _bn(InstanceNormWithStatistics, reference=_module, or_kinds=("instance_norm",)),
    _bn(TokensTransposed, reference=_tokens, inputs=_time_last),
    _bn(TokensFlattened, reference=_tokens, inputs=_time_last),
    _bn(Detr),
    _bn(Detectron),
    _bn(Textbook),
    _bn(TextbookHalf, dtype=torch.float16),
    _bn(DivisionLast),
    _bn(ChannelsLast, reference=_last, inputs=_time_last),
    _bn(WithoutAffine, reference=_bare, affine="none"),
    _bn(Haiku),
)
