"""The encoder-decoder Transformer, pre-LN, one table for both embeddings and the head.

The norms are `F.layer_norm` over parameters of the module's own. The encoder's last norm is read by the
cross attention of every decoder layer. `nn.MultiheadAttention` keeps q, k and v in one packed weight that
cross attention splits: a gain that goes into k and v must leave q alone, for q reads another norm.
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
    context: int = 64
    layers: int = 2
    heads: int = 4
    dim: int = 64
    hidden: int = 128


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "transformer-base": Config(vocab=37000, context=512, layers=6, heads=8, dim=512, hidden=2048),
}


class LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class Attention(nn.Module):
    def __init__(self, config: Config, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.attention = nn.MultiheadAttention(config.dim, config.heads, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        length = x.shape[1]
        future = (
            torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        )
        return self.attention(x, memory, memory, attn_mask=future, need_weights=False)[0]


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class EncoderBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(config.dim), LayerNorm(config.dim)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(config.dim) for _ in range(3))
        self.attention = Attention(config, causal=True)
        self.cross = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


def sinusoids(context: int, dim: int) -> Tensor:
    angles = torch.outer(torch.arange(context), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
    return torch.cat((angles.sin(), angles.cos()), -1)


class EncoderDecoder(nn.Module):
    positions: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.register_buffer("positions", sinusoids(config.context, config.dim), persistent=False)
        self.encoder = nn.Sequential(*(EncoderBlock(config) for _ in range(config.layers)))
        self.encoder_norm = LayerNorm(config.dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.decoder_norm = LayerNorm(config.dim)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) * self.tokens.embedding_dim**0.5 + self.positions[: tokens.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder_norm(self.encoder(self.embed(source)))
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, memory)
        return F.linear(self.decoder_norm(x), self.tokens.weight)


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: EncoderDecoder(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    source, target = (
        integers(config.vocab, batch, 16, seed=seed),
        integers(config.vocab, batch, 12, seed=seed + 1),
    )
    return (source, target), {}
