"""The smallest models that make each lowering rule fire, every parameter away from its default."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, HEADS = 32, 4


class Image(nn.Module):
    """Padding round pools, a gate on channels, two outputs per input channel, groups, a pool of odd windows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.down, self.up = nn.Conv2d(CHANNELS, 8, 1), nn.Conv2d(8, CHANNELS, 1)
        self.large = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1, groups=CHANNELS)
        self.after = nn.Conv2d(2 * CHANNELS, 8, 1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(F.pad(x, (0, 0)), (1, 1, 1, 1)), 2)
        x = F.gelu(self.first(x))
        gated = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))) * x
        return F.adaptive_avg_pool2d(self.norm(self.after(F.relu(self.large(gated)))), 3)


class Words(nn.Module):
    """Attention over heads side by side under a causal table, products on flat rows, axes there and back, a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.wide, self.narrow = nn.Linear(CHANNELS, 48), nn.Linear(48, CHANNELS)
        self.flat = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 6)
        self.bias = nn.Parameter(torch.randn(CHANNELS))
        self.norm, self.last = nn.LayerNorm(CHANNELS), nn.RMSNorm(CHANNELS, eps=1e-3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = x.view(b, n, HEADS, -1).transpose(1, 2)
        open_ = F.scaled_dot_product_attention(h, h, h + 1, scale=0.2)
        x = self.last(x + self.out(y.transpose(1, 2).reshape(b, n, CHANNELS)))
        x = x + open_.transpose(1, 2).flatten(2)
        x = x + self.narrow(F.gelu(self.wide(x)))
        x = torch.addmm(self.bias, x.view(-1, CHANNELS), self.flat).view(b, n, CHANNELS)
        x = F.relu(x.permute(0, 2, 1).permute(0, 2, 1) + 1)
        gated = x * F.silu(x + 2)
        return self.last(gated), gated, x, x


class Rows(nn.Module):
    """Windows of rows that move, the parts of a Fourier transform, a gather by one index, parts of a free length."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 3)
        self.alpha, self.gain = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        b = x.shape[0]
        y = torch.roll(self.before(x).view(b, 4, 4, 6), (-2, -2), (1, 2))
        y = self.after(y.view(b, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 4, 6)).sin()
        first, second = other.chunk(2, 0)
        moved = torch.gather(x[0, 0], 0, torch.tensor([2, 0, 1, 3, 5, 4]))
        squashed = torch.tanh(self.alpha * x) * self.gain
        return y, torch.fft.fft(x).real, first, second * 2, moved.sin(), squashed.reshape(b, 96).exp()


class Experts(nn.Module):
    """Rows sorted by expert, each times its own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)


def import_operators() -> None:
    import transformers.integrations.moe  # noqa: F401


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "image": lambda: (Image(), (torch.randn(2, 3, 20, 20) + 1,)),
    "words": lambda: (Words(), (torch.randn(2, 5, CHANNELS) + 1,)),
    "rows": lambda: (Rows(), (torch.randn(2, 16, 6) + 1, torch.randn(5, 4))),
    "experts": lambda: (import_operators() or Experts(), (torch.randn(6, 16), torch.tensor([2, 3, 6], dtype=torch.int32))),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(7)
    model, args = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval(), args
