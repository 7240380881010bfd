"""Llama: a pre-norm decoder with RoPE, grouped-query attention and SwiGLU. Qwen3 and Gemma by option.

The norms are RMS norms written out as transformers writes them: up to float32, square, mean, rsqrt, back,
gain. `unit_offset` is Gemma's gain `1 + w`, applied before the way back; `qk_norm` normalizes each head of
q and k, where the rotation that follows stops a gain from moving further. `sandwich` also normalizes what
each branch writes.
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
    kv_heads: int = 2
    dim: int = 64
    hidden: int = 160
    eps: float = 1e-6
    theta: float = 10000.0
    tied: bool = False
    qk_norm: bool = False
    sandwich: bool = False
    unit_offset: bool = False


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "small-qwen": Config(tied=True, qk_norm=True),
    "small-gemma": Config(tied=True, qk_norm=True, sandwich=True, unit_offset=True),
    "llama2-7b": Config(vocab=32000, layers=32, heads=32, kv_heads=32, dim=4096, hidden=11008, eps=1e-5),
    "llama3-8b": Config(
        vocab=128256, layers=32, heads=32, kv_heads=8, dim=4096, hidden=14336, eps=1e-5, theta=5e5
    ),
    "tinyllama-1.1b": Config(vocab=32000, layers=22, heads=32, kv_heads=4, dim=2048, hidden=5632, eps=1e-5),
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


class UnitOffsetRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


def norm(config: Config, dim: int) -> nn.Module:
    return (UnitOffsetRMSNorm if config.unit_offset else RMSNorm)(dim, config.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.groups = config.heads // config.kv_heads
        self.q = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = norm(config, config.dim)
        self.attention = Attention(config)
        self.post_norm1 = norm(config, config.dim) if config.sandwich else nn.Identity()
        self.norm2 = norm(config, config.dim)
        self.mlp = MLP(config)
        self.post_norm2 = norm(config, config.dim) if config.sandwich else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_norm1(self.attention(self.norm1(x), cos, sin))
        return x + self.post_norm2(self.mlp(self.norm2(x)))


class Llama(nn.Module):
    frequencies: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = norm(config, config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight
        head_dim = config.dim // config.heads
        frequencies = config.theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = torch.outer(positions.float(), self.frequencies.float()).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: Llama(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (integers(config.vocab, batch, 16, seed=seed),), {}
