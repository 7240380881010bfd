"""The U-Net of DDPM: residual blocks at several resolutions, skip connections, a timestep embedding.

The norms are `nn.GroupNorm`, before SiLU in the residual blocks, where nothing folds, and before a 1x1
convolution in attention, where gain and bias do. On the way up a norm reads the concatenation of stream and
skip, and its groups may lie across the seam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._random import integers, normal, randomized


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 16
    channels: int = 3
    width: int = 16
    multipliers: tuple[int, ...] = (1, 2)
    depth: int = 1
    attention: tuple[int, ...] = (8,)  # at which resolutions
    groups: int = 4


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "ddpm-cifar10": Config(
        image=32, width=128, multipliers=(1, 2, 2, 2), depth=2, attention=(16,), groups=32
    ),
}


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, -1)
        return x + self.out((v @ weights.transpose(1, 2)).view_as(x))


class Stage(nn.Module):
    """A residual block and, at some resolutions, attention."""

    def __init__(self, inputs: int, outputs: int, config: Config, *, attend: bool) -> None:
        super().__init__()
        self.block = ResBlock(inputs, outputs, 4 * config.width, config.groups)
        self.attention = Attention(outputs, config.groups) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.block(x, time))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, _time: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, _time: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, last = config.width, len(config.multipliers) - 1
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.stem = nn.Conv2d(config.channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, side, skips = width, config.image, [width]
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.depth):
                self.down.append(Stage(channels, multiplier * width, config, attend=side in config.attention))
                channels = multiplier * width
                skips.append(channels)
            if level != last:
                self.down.append(Downsample(channels))
                skips.append(channels)
                side //= 2
        self.middle = nn.ModuleList(
            Stage(channels, channels, config, attend=attend) for attend in (True, False)
        )
        for level, multiplier in reversed(tuple(enumerate(config.multipliers))):
            for _ in range(config.depth + 1):
                inputs, outputs = channels + skips.pop(), multiplier * width
                self.up.append(Stage(inputs, outputs, config, attend=side in config.attention))
                channels = outputs
            if level != 0:
                self.up.append(Upsample(channels))
                side *= 2
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.head = nn.Conv2d(channels, config.channels, 3, padding=1)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, device=images.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / (half - 1))
        time = self.time(torch.cat((angles.sin(), angles.cos()), -1).to(images.dtype))
        x = self.stem(images)
        skips = [x]
        for layer in self.down:
            x = layer(x, time)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, time)
        for layer in self.up:
            x = layer(x if isinstance(layer, Upsample) else torch.cat((x, skips.pop()), 1), time)
        return self.head(F.silu(self.norm(x)))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: UNet(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    images = normal(batch, config.channels, config.image, config.image, seed=seed)
    return (images, integers(1000, batch, seed=seed)), {}
