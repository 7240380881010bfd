"""BERT: a post-LN encoder with a padding mask. Two outputs: the hidden states and the pooled first token.

The norms are written out as the first PyTorch port did: mean, mean of squared differences, a division by
the root. Each norm's result is both the branch's input and the next residual, so a gain cannot simply move
into one reader: a post-LN stream is where fold_norm_affine must hold back.
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
    context: int = 32
    layers: int = 2
    heads: int = 4
    dim: int = 64


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "bert-base": Config(vocab=30522, context=512, layers=12, heads=12, dim=768),
}


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight * x + self.bias


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)
        self.norm2 = LayerNorm(config.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.segments = nn.Embedding(2, config.dim)
        self.norm = LayerNorm(config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.dim, config.dim)

    def forward(self, tokens: Tensor, *, segments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`mask`: one where there is a token, zero where there is padding."""
        positions = self.positions.weight[: tokens.shape[1]]
        x = self.norm(self.tokens(tokens) + positions + self.segments(segments))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, bias)
        return x, torch.tanh(self.pooler(x[:, 0]))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: Bert(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    length = min(config.context, 128) // 2
    tokens, segments = integers(config.vocab, batch, length, seed=seed), integers(2, batch, length, seed=seed)
    lengths = 1 + integers(length, batch, 1, seed=seed)
    return (tokens,), {"segments": segments, "mask": (torch.arange(length) < lengths).long()}
