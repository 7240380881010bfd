"""ViT: convolutional patch embedding, class token, pre-LN encoder; LayerScale by option.

The norms are LayerNorms in float32 whatever the model's dtype, through `F.layer_norm`, as CLIP has them.
The class token is a writer of the stream that is a bare parameter behind a concatenation, and the last norm
has one reader that sees a slice of it. LayerScale stands between a branch and the stream: a gain to fold
into the branch's projection.
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
    patch: int = 8
    layers: int = 2
    heads: int = 4
    dim: int = 64
    classes: int = 10
    layer_scale: bool = False


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "small-layer-scale": Config(layer_scale=True),
    "vit-b16": Config(image=224, patch=16, layers=12, heads=12, dim=768, classes=1000),
    "dinov2-b14": Config(image=518, patch=14, layers=12, heads=12, dim=768, classes=1000, layer_scale=True),
}


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        y = F.layer_norm(
            input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return y.type_as(input)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attention = Attention(config)
        self.scale1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.scale2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        patches = (config.image // config.patch) ** 2
        self.patches = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + patches, config.dim))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: ViT(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (normal(batch, 3, config.image, config.image, seed=seed),), {}
