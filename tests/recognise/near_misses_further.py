"""Further functions that a careless reading takes for a norm, a softmax, an attention or an activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import WIDTH, NearMiss, Stateless, gain, named, rows, shift

NORMS = frozenset({"layer_norm", "rms_norm", "crms_norm", "l2_norm", "batch_norm", "group_norm", "instance_norm"})
ATTENTION, SOFTMAX = frozenset({"attention"}), frozenset({"softmax", "attention"})
ACTIVATIONS = frozenset({"gelu", "silu"})


class LearnedEps(nn.Module):
    """icefall's BasicNorm: eps is the exponential of a parameter, no number."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = shift(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.mean(x**2, dim=-1, keepdim=True) + self.eps.exp()) ** -0.5


class BiasNorm(nn.Module):
    """Zipformer: the mean square of what lies beside a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.log_scale = shift(WIDTH), shift(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.mean((x - self.bias) ** 2, dim=-1, keepdim=True) ** -0.5) * self.log_scale.exp()


class LearnedEpsOfChannels(nn.Module):
    """A filter response norm with an eps for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = shift(1, WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6 + self.eps.abs())


class Switchable(nn.Module):
    """Moments of two norms mixed by learned shares."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = gain(2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.shares.softmax(0)
        (v, m), (w, n) = (torch.var_mean(x, axes, correction=0, keepdim=True) for axes in ((2, 3), (1, 2, 3)))
        return (x - (one * m + two * n)) / torch.sqrt(one * v + two * w + 1e-5)


class BiasThenTemperature(nn.Module):
    """The bias is scaled too: it may be counted as an attention, if its mask is."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = gain(4, 1, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2) + torch.arange(6.0)) * self.temperature).softmax(-1) @ v


def variance_of_the_first_half(x: Tensor) -> Tensor:
    """A slice up to a fixed place is whole where rows are short."""
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x[..., :8].var(-1, keepdim=True, unbiased=False) + 1e-5)


def leaky_moment(x: Tensor) -> Tensor:
    return x / torch.sqrt((F.leaky_relu(x) ** 2).mean(-1, keepdim=True) + 1e-6)


def rounded_moment(x: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.round(x * 64).div(64).pow(2).mean(-1, keepdim=True) + 1e-6)


def moment_of_the_last_token(x: Tensor) -> Tensor:
    return x * torch.rsqrt(F.pad(x, (0, 0, 1, -1)).pow(2).mean(-1, keepdim=True) + 1e-6)


def neighbours(x: Tensor) -> Tensor:
    """AlexNet's local response."""
    return F.local_response_norm(x, 5)


def moments_of_the_mirror_image(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    return (x - mean.flip(-1)) / (variance + 1e-5).sqrt()


def two_temperatures(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.exp(0.9 * x).sum(-1, keepdim=True)


def masked_above_only(x: Tensor) -> Tensor:
    return torch.exp(x) * (torch.arange(WIDTH) < 12) / torch.exp(x).sum(-1, keepdim=True)


def taylor(x: Tensor) -> Tensor:
    e = 1 + x + 0.5 * x * x
    return e / e.sum(-1, keepdim=True)


def shares_among_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v


def floor_under_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)).softmax(-1) + 1e-3) @ v


def largest_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return torch.where(weights >= weights.topk(3, -1).values[..., -1:], weights, 0.0) @ v


def weak_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    return torch.where(seen, q @ k.transpose(-1, -2), -10.0).softmax(-1) @ v


def softened_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softplus(q @ k.transpose(-1, -2)).softmax(-1) @ v


def probabilities_times_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return (scores.softmax(-1) * scores) @ v


def mask_scaled_away(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """-1e4 times 1e-4: a masked score still has a weight."""
    return ((q @ k.transpose(-1, -2)).masked_fill(~keep, -1e4) * 1e-4).softmax(-1) @ v


def mask_turned_round(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (-((q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9))).softmax(-1) @ v


def masked_twice_and_in_full(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A query that sees nothing prefers what is masked with the larger number."""
    scores = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -1e9)
    return scores.masked_fill(~keep, -1e4).softmax(-1) @ v


def bias_behind_the_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A query that sees nothing weighs by the bias."""
    return ((q @ k.transpose(-1, -2)).masked_fill(~keep, -1e9) + 0.3 * torch.arange(6.0)).softmax(-1) @ v


def gelu_with_another_constant(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((math.sqrt(2 / math.pi) + 1e-6) * (x + 0.044715 * x**3)))


def gelu_with_a_short_root(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 1.41421))


def nearly_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.000001 * x)


def _tokens() -> tuple[Tensor, ...]:
    return (rows(2, 5, WIDTH),)


def _image() -> tuple[Tensor, ...]:
    return (rows(2, WIDTH, 4, 6),)


def _heads() -> tuple[Tensor, ...]:
    return tuple(0.7 * torch.randn(2, 4, 6, 8) for _ in range(3))


def _masked() -> tuple[Tensor, ...]:
    return (*_heads(), (torch.rand(2, 1, 6, 6) > 0.4) & (torch.arange(6) != 3)[:, None])


def of(make: Any, forbidden: frozenset[str], inputs: Callable[[], tuple[Tensor, ...]] = _tokens) -> NearMiss:
    name = named(make)
    module = make if isinstance(make, type) else lambda: Stateless(make)
    why = " ".join((make.__doc__ or name.replace("_", " ")).split())
    return NearMiss(name=f"near_further_{name}", make=module, why=why, forbidden=forbidden, inputs=inputs)


NEAR_MISSES: tuple[NearMiss, ...] = (
    of(LearnedEps, NORMS),
    of(BiasNorm, NORMS),
    of(LearnedEpsOfChannels, NORMS, _image),
    of(Switchable, NORMS, _image),
    of(BiasThenTemperature, frozenset(), _heads),
    of(variance_of_the_first_half, NORMS),
    of(leaky_moment, NORMS),
    of(rounded_moment, NORMS),
    of(moment_of_the_last_token, NORMS),
    of(neighbours, NORMS, _image),
    of(moments_of_the_mirror_image, NORMS, _image),
    of(two_temperatures, SOFTMAX),
    of(masked_above_only, SOFTMAX),
    of(taylor, SOFTMAX),
    of(shares_among_queries, ATTENTION, _heads),
    of(floor_under_probabilities, ATTENTION, _heads),
    of(largest_three, ATTENTION, _heads),
    of(weak_mask, ATTENTION, _heads),
    of(softened_scores, ATTENTION, _heads),
    of(probabilities_times_scores, ATTENTION, _heads),
    of(mask_scaled_away, ATTENTION, _masked),
    of(mask_turned_round, ATTENTION, _masked),
    of(masked_twice_and_in_full, ATTENTION, _masked),
    of(bias_behind_the_mask, ATTENTION, _masked),
    of(gelu_with_another_constant, ACTIVATIONS),
    of(gelu_with_a_short_root, ACTIVATIONS),
    of(nearly_silu, ACTIVATIONS),
)
