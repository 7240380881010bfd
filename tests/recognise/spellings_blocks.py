"""Whole blocks in primitive operators: several patterns in one graph, streams that are read again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Spelling, gain, named, rows, shift
from .spellings_batch_norm import Detr
from .spellings_layer_norm_statistics import Bert
from .spellings_pointwise import DynamicTanh, erf_gelu, gpt2_gelu
from .spellings_rms_norm import Llama

HEADS, DIM = 2, WIDTH // 2


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, DIM)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Written out, so that nothing in a block is recognised already."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(-2)


class Gpt2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = Bert(), Bert()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(z) for z in self.qkv(self.ln_1(x)).chunk(3, -1))
        x = x + self.out(_attend(q, k, v, causal=True))
        return x + self.down(gpt2_gelu(self.up(self.ln_2(x))))


class BertLayer(Gpt2):
    """Post-norm: each sum is normalised and is the next stream."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(z) for z in self.qkv(x).chunk(3, -1))
        x = self.ln_1(x + self.out(_attend(q, k, v)))
        return self.ln_2(x + self.down(erf_gelu(self.up(x))))


class LlamaLayer(nn.Module):
    """RMSNorm, rotary positions, one key head for two query heads, SwiGLU, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.post_norm = Llama(), Llama()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * DIM, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_norm(x)
        k, v = (_split(z) for z in self.kv(h).chunk(2, -1))
        q, k = self.rotated(_split(self.q(h))), self.rotated(k)
        k, v = k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1)
        x = x + self.o(_attend(q, k, v, causal=True).to(x.dtype))
        h = self.post_norm(x)
        gate = self.gate(h)
        return x + self.down(gate * torch.sigmoid(gate) * self.up(h))

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] * 0.3 ** torch.arange(DIM // 2)
        angle = torch.cat([angle, angle], -1).to(x.dtype)
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


class Sandwich(nn.Module):
    """Gemma2 and Swin v2: a norm before and a norm after the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Llama(), Llama()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.down(torch.relu(self.up(self.before(x)))))


class Bottleneck(nn.Module):
    """Three convolutions, three frozen norms, one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv3 = (
            nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
            nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
        )
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4, bias=False)
        self.norm1, self.norm2, self.norm3 = Detr(), Detr(), Detr()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu(self.norm3(self.conv3(y)) + x)


class ConvNextBlock(nn.Module):
    """Depthwise convolution, channels-last norm, LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.up, self.down = Bert(), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.gamma = shift(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(erf_gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class SharedStatistics(nn.Module):
    """One normalised tensor, two gains: both readers of one set of statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.b2 = gain(WIDTH), gain(WIDTH), shift(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * self.w1, y * self.w2 + self.b2


class WithoutNorms(nn.Module):
    """A block of a network without normalisation: DyT in the place of both norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DynamicTanh(), DynamicTanh()
        self.qkv, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + _attend(*(_split(z) for z in self.qkv(self.first(x)).chunk(3, -1)))
        return x + self.mlp(self.second(x))


# -- references ----------------------------------------------------------------------------------------------


def _merged(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return y.transpose(1, 2).flatten(-2)


def _gpt2(m: Any, x: Tensor) -> Tensor:
    q, k, v = (_split(z) for z in m.qkv(references.layer_norm(m.ln_1, x)).chunk(3, -1))
    x = x + m.out(_merged(q, k, v, causal=True))
    return x + m.down(F.gelu(m.up(references.layer_norm(m.ln_2, x)), approximate="tanh"))


def _bert(m: Any, x: Tensor) -> Tensor:
    x = references.layer_norm(m.ln_1, x + m.out(_merged(*(_split(z) for z in m.qkv(x).chunk(3, -1)))))
    return references.layer_norm(m.ln_2, x + m.down(F.gelu(m.up(x))))


def _llama(m: Any, x: Tensor) -> Tensor:
    h = references.rms_norm(m.input_norm, x)
    k, v = (_split(z) for z in m.kv(h).chunk(2, -1))
    x = x + m.o(_merged(m.rotated(_split(m.q(h))), m.rotated(k), v, causal=True))
    h = references.rms_norm(m.post_norm, x)
    return x + m.down(F.silu(m.gate(h)) * m.up(h))


def _sandwich(m: Any, x: Tensor) -> Tensor:
    return x + references.rms_norm(m.after, m.down(F.relu(m.up(references.rms_norm(m.before, x)))))


def _bottleneck(m: Any, x: Tensor) -> Tensor:
    y = F.relu(references.batch_norm(m.norm1, m.conv1(x)))
    y = F.relu(references.batch_norm(m.norm2, m.conv2(y)))
    return F.relu(references.batch_norm(m.norm3, m.conv3(y)) + x)


def _convnext(m: Any, x: Tensor) -> Tensor:
    y = references.layer_norm(m.norm, m.conv(x).movedim(1, -1))
    return x + (m.down(F.gelu(m.up(y))) * m.gamma).movedim(-1, 1)


def _shared(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x, (WIDTH,), m.w1), F.layer_norm(x, (WIDTH,), m.w2, m.b2)


def _without_norms(m: Any, x: Tensor) -> Tensor:
    def dyt(n: Any, z: Tensor) -> Tensor:
        return torch.addcmul(n.bias, torch.tanh(n.alpha * z), n.weight)

    x = x + _merged(*(_split(z) for z in m.qkv(dyt(m.first, x)).chunk(3, -1)))
    return x + m.mlp(dyt(m.second, x))


def _block(make: Callable[[], nn.Module], kind: str, count: int, **given: Any) -> Spelling:
    said: dict[str, Any] = dict(affine="weight+bias", magnitudes=(1.0, 1e-2))
    said |= dict(inputs=lambda: (rows(2, 5, WIDTH).clamp(-5, 5),))
    return Spelling(kind=kind, count=count, name="block_" + named(make), make=make, **(said | given))


def _image() -> tuple[Tensor, ...]:
    return (rows(2, WIDTH, 4, 5),)


GELU = {"attention": 1, "gelu": 1}
SILU = {"attention": 1, "silu": 1}

SPELLINGS: tuple[Spelling, ...] = (
    _block(Gpt2, "layer_norm", 2, also=GELU, eps=1e-12, facts={"placement": "pre"}, reference=_gpt2),
    _block(BertLayer, "layer_norm", 2, also=GELU, eps=1e-12, facts={"placement": "post"}, reference=_bert),
    _block(
        LlamaLayer,
        "rms_norm",
        2,
        also=SILU,
        eps=1e-6,
        affine="weight",
        facts={"placement": "pre"},
        reference=_llama,
        dtype=torch.bfloat16,
    ),
    _block(
        Sandwich,
        "rms_norm",
        2,
        eps=1e-6,
        affine="weight",
        facts={"placement": "sandwich"},
        reference=_sandwich,
    ),
    _block(Bottleneck, "batch_norm", 3, eps=1e-5, reference=_bottleneck, inputs=_image),
    _block(ConvNextBlock, "layer_norm", 1, also={"gelu": 1}, eps=1e-12, reference=_convnext, inputs=_image),
    _block(
        SharedStatistics,
        "layer_norm",
        1,
        eps=1e-5,
        affine="none",
        or_affine=("weight", "weight+bias"),
        reference=_shared,
        or_count=2,
    ),
    _block(WithoutNorms, "dyt", 2, also={"attention": 1}, reference=_without_norms),
)
