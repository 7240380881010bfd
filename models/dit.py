"""DiT: a diffusion transformer over image latents, conditioned by adaLN-Zero on timestep and class.

The norms are `nn.LayerNorm` without parameters; gain and bias are activations, a set for each sample, and
the gain is spelled `1 + scale`: only its one can be folded, into the linear that makes it. Nor can weights
centre the stream: a branch writes `gate * y`, where the gate differs by channel and by sample. `qk_norm`
adds an `nn.RMSNorm` to q and k.
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
    image: int = 8
    patch: int = 2
    channels: int = 4
    layers: int = 2
    heads: int = 4
    dim: int = 64
    classes: int = 10
    frequencies: int = 32
    qk_norm: bool = False


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "small-qk-norm": Config(qk_norm=True),
    "dit-xl-2": Config(image=32, layers=28, heads=16, dim=1152, classes=1000, frequencies=256),
}


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    steps = torch.arange(dim // 2, device=positions.device)
    angles = positions.float()[..., None] * torch.exp(-math.log(10000.0) * steps / (dim // 2))
    return torch.cat((angles.cos(), angles.sin()), -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        head_dim = config.dim // config.heads
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Head(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))
        self.out = nn.Linear(config.dim, config.patch**2 * 2 * config.channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, 1)
        return self.out(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    positions: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.side = config.image // config.patch
        self.patches = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.time = nn.Sequential(
            nn.Linear(config.frequencies, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.labels = nn.Embedding(config.classes + 1, config.dim)  # the last one: no class
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        axis = sinusoids(torch.arange(self.side), config.dim // 2)
        grid = torch.cat((axis.repeat(self.side, 1), axis.repeat_interleave(self.side, 0)), -1)
        self.register_buffer("positions", grid[None], persistent=False)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Noise and variance for each latent: (batch, 2 * channels, image, image)."""
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(sinusoids(timesteps, self.config.frequencies).to(x.dtype)) + self.labels(labels)
        for block in self.blocks:
            x = block(x, condition)
        p, s = self.config.patch, self.side
        y = self.head(x, condition).unflatten(2, (p, p, -1)).unflatten(1, (s, s))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: DiT(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    latents = normal(batch, config.channels, config.image, config.image, seed=seed)
    return (latents, integers(1000, batch, seed=seed), integers(config.classes, batch, seed=seed)), {}
