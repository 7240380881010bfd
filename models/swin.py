"""Swin Transformer: attention in shifted windows with a relative position bias, patch merging between stages.

The norms are `nn.LayerNorm`, pre-LN. Between a norm and the linear that reads it stand a roll and a cut
into windows that move rows but do not mix them; patch merging normalizes four concatenated neighbours (a
LayerNorm over 4C, whose mean is not that of its parts) before a linear without bias; the stem's norm writes
the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._random import normal, randomized


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 32
    patch: int = 4
    window: int = 4
    dim: int = 32
    depths: tuple[int, ...] = (2, 2)
    heads: tuple[int, ...] = (2, 4)
    classes: int = 10


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "swin-t": Config(image=224, window=7, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), classes=1000),
}


def split(x: Tensor, window: int) -> Tensor:
    """(batch, height, width, channels) to (batch, windows, rows in a window, channels)."""
    return x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join(x: Tensor, window: int, side: int) -> Tensor:
    x = x.unflatten(2, (window, window)).unflatten(1, (side // window, side // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_index(window: int) -> Tensor:
    """For each pair of rows in a window, which entry of the bias table is theirs."""
    row, column = torch.arange(window * window) // window, torch.arange(window * window) % window
    down, right = row[:, None] - row + window - 1, column[:, None] - column + window - 1
    return down * (2 * window - 1) + right


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """-100 between rows of a window that were not neighbours before the roll: (windows, 1, rows, rows)."""
    edge = torch.arange(side)
    band = (edge >= side - window).long() + (edge >= side - shift).long()
    regions = split((3 * band[:, None] + band)[None, :, :, None], window).flatten(2)[0]
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)[:, None]


class Attention(nn.Module):
    index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.table[self.index].permute(2, 0, 1)
        scores = scores if mask is None else scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


class Block(nn.Module):
    mask: Tensor | None

    def __init__(self, dim: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.register_buffer("mask", shift_mask(side, window, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = join(self.attention(split(y, self.window), self.mask), self.window, self.side)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = (x[:, i::2, j::2] for j in range(2) for i in range(2))
        return self.reduction(self.norm(torch.cat(tuple(corners), -1)))


class Swin(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, side = config.dim, config.image // config.patch
        self.patches = nn.Conv2d(3, dim, config.patch, config.patch)
        self.patch_norm = nn.LayerNorm(dim)
        self.blocks = nn.Sequential()
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            if stage > 0:
                self.blocks.append(PatchMerging(dim))
                dim, side = 2 * dim, side // 2
            window = min(config.window, side)
            for i in range(depth):
                shift = window // 2 if i % 2 and window < side else 0
                self.blocks.append(Block(dim, heads, side, window, shift))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_norm(self.patches(images).permute(0, 2, 3, 1))
        return self.head(self.norm(self.blocks(x)).mean((1, 2)))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: Swin(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (normal(batch, 3, config.image, config.image, seed=seed),), {}
