"""Models put together at random from parts that are hard to rewrite rightly: the seed is the whole description."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import randomised

WIDTH = 12
VOCABULARY = 20
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Drawn:
    """A model with its example and inputs of another size."""

    model: nn.Module
    example: Inputs
    other: Inputs


def draw(seed: int) -> Drawn:
    """A language model or an image model, with random parameters and statistics."""
    r = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if r.random() < 0.6:
            model: nn.Module = Tokens(r)
            example, other = (torch.randint(VOCABULARY, (2, 7)),), (torch.randint(VOCABULARY, (3, 5)),)
        else:
            model = Images(r)
            example, other = (torch.randn(2, 4, 12, 12) + 0.3,), (torch.randn(3, 4, 12, 12) + 0.3,)
        model.eval()(*example)  # lazy layers take their size
        return Drawn(randomised(model), example, other)


# -- norms as people write them ------------------------------------------------------------------------------------


class Rms(nn.Module):
    """In float32, with a gain or one more than it."""

    def __init__(self, width: int, offset: int = 0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(width)), offset

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (self.offset + self.weight)).type_as(x)


class WrittenLayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * self.gain + self.shift


class ChannelsFirst(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        normal = (x - mean) / torch.sqrt(variance + 1e-6)
        return x + self.mix(self.gain[:, None, None] * normal + self.shift[:, None, None])


NORMS: tuple[Callable[[random.Random], nn.Module], ...] = (
    lambda r: nn.LayerNorm(WIDTH),
    lambda r: nn.LayerNorm(WIDTH, elementwise_affine=False),
    lambda r: Rms(WIDTH, r.randint(0, 1)),
    lambda r: WrittenLayerNorm(WIDTH),
    lambda r: nn.RMSNorm(WIDTH, eps=1e-5),
    lambda r: nn.Identity(),
)


# -- parts of a language model -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three heads, perhaps of one key; fused, or written out with one mask or another."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.keys, self.causal, self.style = r.choice([3, 1]), r.random() < 0.5, r.randint(0, 2)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 4 * self.keys), nn.Linear(WIDTH, 4 * self.keys)
        norms = r.random() < 0.3
        self.q_norm, self.k_norm = (Rms(4), Rms(4)) if norms else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q(x).view(batch, length, 3, 4).transpose(1, 2))
        k = self.k_norm(self.k(x).view(batch, length, self.keys, 4).transpose(1, 2))
        v = self.v(x).view(batch, length, self.keys, 4).transpose(1, 2)
        k, v = k.repeat_interleave(3 // self.keys, 1), v.repeat_interleave(3 // self.keys, 1)
        return self.o(self._mix(q, k, v, length).transpose(1, 2).reshape(batch, length, WIDTH))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        if self.style == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        scores = (q * 0.5) @ k.transpose(-2, -1)
        if self.causal:
            least = float("-inf") if self.style == 1 else torch.finfo(q.dtype).min
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), least)
        return scores.softmax(-1) @ v


class OffByOne(nn.Module):
    """softmax1: rows that do not sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.exp(self.q(x) @ self.k(x).transpose(-1, -2) * 0.1)
        return weights / (1 + weights.sum(-1, keepdim=True)) @ self.v(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Shared(nn.Module):
    """One projection behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.one(x)) + self.linear(self.two(x * 2))


class SharedNorm(nn.Module):
    """One norm of the stream and of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.prompt = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)) + self.norm(self.prompt)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)


class TokenBatchNorm(nn.Module):
    """RepBN: BN(x) + eta x, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.eta = nn.Parameter(torch.rand(1) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return self.linear((self.norm(y) + self.eta * y).transpose(1, 2))


class Halves(nn.Module):
    """A norm of one half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH // 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.linear(torch.cat([self.norm(a), b], -1))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        y += 1
        y[:, 0] = y[:, 0] * 2
        return y.mul_(0.5)


class Adapter(nn.Module):
    """LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.7


class Adaptive(nn.Module):
    """Gain and shift depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.condition, self.linear = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gain, shift = self.condition(F.silu(x.mean(1, keepdim=True))).chunk(2, -1)
        return self.linear(self.norm(x) * (1 + gain) + shift)


def _parametrized(r: random.Random) -> nn.Module:
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    return nn.Sequential(weight_norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), spectral_norm(nn.Linear(WIDTH, WIDTH)))


MIXERS: tuple[Callable[[random.Random], nn.Module], ...] = (
    Attention,
    *(lambda r, kind=kind: kind() for kind in (OffByOne, Gated, Shared, SharedNorm, LayerScale, TokenBatchNorm)),
    *(lambda r, kind=kind: kind() for kind in (Halves, InPlace, Adapter, Adaptive)),
    _parametrized,
    lambda r: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
    lambda r: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
    lambda r: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
)


class Tokens(nn.Module):
    """Blocks of every placement, a head that may be tied, outputs of several structures."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=r.random() < 0.5)
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH)) if r.random() < 0.7 else None
        norm = r.choice(NORMS)
        self.blocks, self.placements = nn.ModuleList(), []
        for _ in range(r.randint(1, 4)):
            self.placements.append(r.choice(["pre", "pre", "pre", "post", "sandwich", "parallel", "none"]))
            first = norm(r) if r.random() < 0.8 else r.choice(NORMS)(r)
            self.blocks.append(nn.ModuleList([first, r.choice(MIXERS)(r), r.choice(NORMS)(r), r.choice(MIXERS)(r)]))
        self.norm = r.choice(NORMS)(r)
        self.output = r.choice(["logits", "dict", "tuple", "hidden"])
        if r.random() < 0.3:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions[:, : ids.shape[1]]
        for placement, block in zip(self.placements, self.blocks, strict=True):
            x = self._block(placement, x, *block)
        logits = self.head(self.norm(x))
        if self.output == "dict":
            return {"logits": logits, "pooled": self.norm(x).mean(1)}
        return {"logits": logits, "tuple": (logits, (x[:, 0],)), "hidden": (logits, x)}[self.output]

    @staticmethod
    def _block(placement: str, x: Tensor, norm: nn.Module, mix: nn.Module, norm2: nn.Module, mix2: nn.Module) -> Tensor:
        if placement == "pre":
            x = x + mix(norm(x))
            return x + mix2(norm2(x))
        if placement == "post":
            return norm(x + mix(x))
        if placement == "sandwich":
            return x + norm2(mix(norm(x)))
        if placement == "parallel":
            h = norm(x)
            return x + mix(h) + mix2(h)
        return mix2(mix(x))


# -- parts of an image model ---------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A convolution of some kind with a BatchNorm behind or before it."""

    def __init__(self, r: random.Random, width: int, out: int) -> None:
        super().__init__()
        kind, kernel = r.choice(["plain", "plain", "transposed", "norm first"]), r.choice([1, 3, 3])
        groups = r.choice([g for g in (1, 1, 2, width) if out % g == 0])
        given: dict[str, Any] = {"padding": kernel // 2, "groups": groups, "bias": r.random() < 0.5}
        if kind == "transposed":
            self.conv: nn.Module = nn.ConvTranspose2d(width, out, kernel, **given)
        else:
            mode = r.choice(["zeros", "zeros", "reflect", "circular"]) if kernel == 3 else "zeros"
            self.conv = nn.Conv2d(width, out, kernel, padding_mode=mode, **given)
        first = kind == "norm first"
        self.norm = nn.BatchNorm2d(width if first else out, affine=r.random() < 0.9, eps=r.choice([1e-5, 1e-3]))
        self.order = (self.norm, self.conv) if first else (self.conv, self.norm)
        self.act = r.choice([nn.ReLU(), nn.GELU(), nn.Identity(), nn.ReLU6(), nn.SiLU()])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.order[1](self.order[0](x)))


class Branches(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1, bias=False, groups=groups)
        self.narrow = nn.Conv2d(width, width, 1, bias=False, groups=groups)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow, identity = self.norms
        return F.relu(wide(self.wide(x)) + narrow(self.narrow(x)) + identity(x))


class TwoNorms(nn.Module):
    """One convolution with two BatchNorms, and called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.one(y) * torch.sigmoid(self.two(y)) + self.one(self.conv(x.flip(-1)))


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


def _stage(r: random.Random, width: int) -> tuple[nn.Module, int]:
    out = r.choice([8, 8, 12, 16])
    grouped = nn.GroupNorm(r.choice([1, 2, 4]), width)
    pool = r.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Identity(), nn.AvgPool2d(3, 1, 1)])
    same: list[Callable[[], nn.Module]] = [
        lambda: Branches(width, r.choice([1, 2, 4, width])),
        lambda: TwoNorms(width),
        lambda: ChannelsFirst(width),
        lambda: nn.Sequential(grouped, nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
        lambda: nn.Sequential(Squeeze(width), pool, nn.BatchNorm2d(width)),
    ]
    return (Convolution(r, width, out), out) if r.random() < 0.45 else (r.choice(same)(), width)


class Images(nn.Module):
    def __init__(self, r: random.Random) -> None:
        super().__init__()
        stages: list[nn.Module] = [Convolution(r, 4, 8)]
        width = 8
        for _ in range(r.randint(1, 4)):
            stage, width = _stage(r, width)
            stages.append(stage)
        self.stages = nn.Sequential(*stages, nn.BatchNorm2d(width))
        self.flat, self.norm, self.head = r.random() < 0.4, nn.BatchNorm1d(width), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(x)
        if self.flat:
            return self.head(F.adaptive_avg_pool2d(y, 2).flatten(1))
        return self.head(self.norm(y.mean((2, 3))))
