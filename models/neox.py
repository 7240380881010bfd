"""GPT-NeoX (Pythia): attention and MLP in parallel, both reading the same stream; partly rotary heads.

The norms are written out with `torch.var_mean` and `rsqrt`. Two LayerNorms read one tensor and differ in
gain and bias only: once those are folded into the linears behind them, one norm remains. The packed qkv is
interleaved by head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._random import integers, randomized


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab: int = 96
    layers: int = 2
    heads: int = 4
    dim: int = 64
    rotary: float = 0.25


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "pythia-160m": Config(vocab=50304, layers=12, heads=12, dim=768),
}


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, kept), -1)


class Attention(nn.Module):
    frequencies: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        turned = int(config.rotary * config.dim / config.heads)
        frequencies = 10000.0 ** -(torch.arange(0, turned, 2) / turned)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        positions = torch.arange(x.shape[1], device=x.device)
        angles = torch.outer(positions.float(), self.frequencies.float()).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class NeoX(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens))))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: NeoX(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (integers(config.vocab, batch, 16, seed=seed),), {}
