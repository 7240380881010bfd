"""Functions that the inventory names, spelt as their authors do, and what they could be mistaken for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfuse

CHANNELS = 6


class Model(nn.Module):
    def __init__(self, function: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(CHANNELS) + 0.5), nn.Parameter(torch.randn(CHANNELS))
        self.v, self.rho = nn.Parameter(torch.rand(CHANNELS) + 0.3), nn.Parameter(torch.rand(CHANNELS))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("variance", torch.rand(CHANNELS) + 2)
        self.register_buffer("mask", (torch.rand(2, 1, 5, 4) > 0.5).float())
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _wide(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _sparsemax(x: Tensor) -> Tensor:
    x = x - x.max(-1, keepdim=True).values
    z, _ = torch.sort(x, dim=-1, descending=True)
    total = z.cumsum(-1) - 1
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    size = (k * z > total).sum(-1, keepdim=True)
    return torch.clamp(x - total.gather(-1, size - 1) / size, min=0)


def _sparsemax_by_topk(x: Tensor) -> Tensor:
    z = torch.topk(x, x.shape[-1], dim=-1).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    tau = ((z.cumsum(-1) - 1) / k).amax(-1, keepdim=True)
    return (x - tau).relu()


def _entmax15(x: Tensor) -> Tensor:
    x = (x - x.max(-1, keepdim=True).values) / 2
    z, _ = torch.sort(x, dim=-1, descending=True)
    rho = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    mean, square = z.cumsum(-1) / rho, (z**2).cumsum(-1) / rho
    tau = mean - torch.sqrt(torch.clamp((1 - rho * (square - mean**2)) / rho, 0))
    size = (tau <= z).sum(-1, keepdim=True)
    return torch.clamp(x - tau.gather(-1, size - 1), min=0) ** 2


def _stablemax(x: Tensor) -> Tensor:
    s = torch.where(x < 0, 1 / (1 - x), x + 1)
    return s / torch.sum(s, dim=-1, keepdim=True)


def _off_by_one(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True).clamp_min(0)
    e = torch.exp(x - top)
    return e / (torch.exp(-top) + e.sum(-1, keepdim=True))


def _sink(m: Model, x: Tensor) -> Tensor:
    """gpt-oss: a learned score for each head, in the softmax and not in the result."""
    both = torch.cat([x, _wide(m.v).expand(x.shape[0], -1, x.shape[2], 1)], -1)
    return (both - both.max(-1, keepdim=True).values).softmax(-1)[..., :-1]


def _sink_by_hand(m: Model, x: Tensor) -> Tensor:
    return x.exp() / (_wide(m.v).exp() + x.exp().sum(-1, keepdim=True))


def _evo_s0(m: Model, x: Tensor, groups: int = 2) -> Tensor:
    parts = x.reshape(x.shape[0], groups, CHANNELS // groups, x.shape[2], x.shape[3])
    std = (parts.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt().expand(parts.shape).reshape(x.shape)
    return x * (x * _wide(m.v)).sigmoid() / std * _wide(m.gain) + _wide(m.shift)


def _evo_b0(m: Model, x: Tensor) -> Tensor:
    left = (_wide(m.variance) + 1e-5).sqrt()
    right = x * _wide(m.v) + (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x / left.max(right) * _wide(m.gain) + _wide(m.shift)


def _adalin(m: Model, x: Tensor) -> Tensor:
    one = (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(x.var((2, 3), keepdim=True) + 1e-5)
    two = (x - x.mean((1, 2, 3), keepdim=True)) / torch.sqrt(x.var((1, 2, 3), keepdim=True) + 1e-5)
    rho = _wide(m.rho).expand(x.shape[0], -1, -1, -1)
    return (rho * one + (1 - rho) * two) * _wide(m.gain) + _wide(m.shift)


def _adalin_biased(m: Model, x: Tensor) -> Tensor:
    one, two = nn.functional.instance_norm(x), nn.functional.group_norm(x, 1)
    return (_wide(m.rho) * one + (1 - _wide(m.rho)) * two) * _wide(m.gain) + _wide(m.shift)


def _region(x: Tensor, mask: Tensor) -> Tensor:
    total = mask.sum((0, 2, 3), keepdim=True)
    mean = (x * mask).sum((0, 2, 3), keepdim=True) / total
    whole = x * mask + (1 - mask) * mean
    return nn.functional.batch_norm(whole, None, None, None, None, True) * (total / mask.numel()).sqrt()


def _region_norm(m: Model, x: Tensor) -> Tensor:
    inside, outside = _region(x * m.mask, m.mask), _region(x * (1 - m.mask), 1 - m.mask)
    return inside * _wide(m.gain) + outside * _wide(m.v)


NAMED: dict[str, tuple[str, Callable[[Model, Tensor], Tensor]]] = {
    "sparsemax": ("sparsemax", lambda m, x: _sparsemax(x)),
    "sparsemax of scaled scores": ("sparsemax", lambda m, x: _sparsemax(x * 0.3)),
    "sparsemax by topk": ("sparsemax", lambda m, x: _sparsemax_by_topk(x)),
    "entmax 1.5": ("entmax", lambda m, x: _entmax15(x)),
    "stablemax": ("stablemax", lambda m, x: _stablemax(x)),
    "softmax off by one": ("softmax_off_by_one", lambda m, x: x.exp() / (1 + x.exp().sum(-1, keepdim=True))),
    "softmax off by one, stable": ("softmax_off_by_one", lambda m, x: _off_by_one(x)),
    "softmax beside a zero": (
        "softmax_off_by_one", lambda m, x: torch.cat([x, torch.zeros_like(x[..., :1])], -1).softmax(-1)[..., :-1]
    ),
    "softmax with a sink": ("softmax_with_sink", _sink),
    "softmax with a sink by hand": ("softmax_with_sink", _sink_by_hand),
    "DyISRU": (
        "dyisru", lambda m, x: x / torch.sqrt(m.scalar.square() + x * x) * _wide(m.gain) + _wide(m.shift)
    ),
    "DyISRU of channels": ("dyisru", lambda m, x: 2.4 * x * torch.rsqrt(_wide(m.v) + x.pow(2)) * _wide(m.gain)),
    "EvoNorm S0": ("evo_norm", _evo_s0),
    "EvoNorm B0": ("evo_norm", _evo_b0),
    "AdaLIN": ("adalin", _adalin),
    "AdaLIN, biased": ("adalin", _adalin_biased),
    "region norm": ("region_norm", _region_norm),
}  # fmt: skip
OTHER: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "a linear share": lambda m, x: x.relu() / (x.relu().sum(-1, keepdim=True) + 1e-6),
    "eps in a softmax": lambda m, x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1e-3),
    "the k largest": lambda m, x: torch.topk(x, 3, dim=-1).values.softmax(-1),
    "a root of squares": lambda m, x: x / torch.sqrt(m.scalar.square() + x.abs()),
    "Swish over a deviation about the mean of others": lambda m, x: x * x.sigmoid() / x.std((0, 2, 3), keepdim=True),
    "two instance norms": lambda m, x: _wide(m.rho) * nn.functional.instance_norm(x)
    + (1 - _wide(m.rho)) * nn.functional.instance_norm(x.relu()),
}


def _inspect(function: Callable[[Model, Tensor], Tensor]) -> normfuse.Inventory:
    torch.manual_seed(5)
    model = Model(function).eval()
    return normfuse.inspect(model, (torch.randn(2, CHANNELS, 5, 4) + 0.3,))


@pytest.mark.parametrize("name", NAMED)
def test_it_has_its_name(name: str) -> None:
    kind, function = NAMED[name]
    found = _inspect(function)
    assert found.count(kind) == 1
    assert kind in str(found)
    if not kind.startswith(("adalin", "region")):
        assert {p.kind for p in found.patterns} - {"softmax"} == {kind}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_none_of_them_has_none_of_their_names(name: str) -> None:
    named = {kind for kind, _ in NAMED.values()}
    assert not named & {p.kind for p in _inspect(OTHER[name]).patterns}
