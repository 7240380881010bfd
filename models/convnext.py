"""ConvNeXt: a depthwise 7x7 convolution, a LayerNorm over channels, an inverted MLP, a layer scale.

The norms come in two spellings of one function: inside a block `nn.LayerNorm` over the last axis between
two permutes, in the stem and between stages written out over axis 1 of a channels-first tensor. The stem's
norm writes the stream of its stage, and the norm between stages reads it in front of a strided convolution
without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._random import normal, randomized


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 32
    depths: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (16, 32)
    classes: int = 10


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "convnext-tiny": Config(image=224, depths=(3, 3, 9, 3), widths=(96, 192, 384, 768), classes=1000),
}


class ChannelsFirstLayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.widths[0]
        self.features = nn.Sequential(nn.Conv2d(3, channels, 4, 4), ChannelsFirstLayerNorm(channels))
        for depth, width in zip(config.depths, config.widths, strict=True):
            if width != channels:
                self.features.extend((ChannelsFirstLayerNorm(channels), nn.Conv2d(channels, width, 2, 2)))
                channels = width
            self.features.extend(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images).mean((2, 3))))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: ConvNeXt(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (normal(batch, 3, config.image, config.image, seed=seed),), {}
