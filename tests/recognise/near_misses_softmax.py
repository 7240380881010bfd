"""Almost softmax, almost attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import NearMiss, Reference, Stateless, named
from .spellings_attention import DIM, HEADS, ROOT, heads

LENGTH = 6
SOFTMAX = frozenset({"softmax", "log_softmax", "attention"})
ATTENTION = frozenset({"attention"})


# -- almost softmax ------------------------------------------------------------------------------------------


def off_by_one(x: Tensor) -> Tensor:
    """exp(x) / (1 + sum exp(x))."""
    e = torch.exp(x)
    return e / (1 + e.sum(-1, keepdim=True))


def off_by_one_stable(x: Tensor) -> Tensor:
    """The same with the maximum subtracted, and exp(-max) for the one."""
    top = x.amax(-1, keepdim=True).clamp_min(0)
    e = torch.exp(x - top)
    return e / (torch.exp(-top) + e.sum(-1, keepdim=True))


def one_added_after_the_maximum(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / (1 + e.sum(-1, keepdim=True))


def eps_in_the_denominator(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / (e.sum(-1, keepdim=True) + 1e-3)


def sigmoids_over_their_sum(x: Tensor) -> Tensor:
    """DeepSeek-V3's router."""
    s = torch.sigmoid(x)
    return s / s.sum(-1, keepdim=True)


def softplus_over_sum(x: Tensor) -> Tensor:
    s = F.softplus(x)
    return s / s.sum(-1, keepdim=True)


def squares_over_sum(x: Tensor) -> Tensor:
    return x.square() / x.square().sum(-1, keepdim=True)


def exp_minus_one(x: Tensor) -> Tensor:
    e = torch.expm1(x)
    return e / e.sum(-1, keepdim=True)


def absolute_below_only(x: Tensor) -> Tensor:
    """exp(x) over the sum of exp(|x|)."""
    return x.exp() / x.abs().exp().sum(-1, keepdim=True)


def over_the_largest(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.amax(-1, keepdim=True)


def over_the_mean(x: Tensor) -> Tensor:
    """n times too large: what is counted as a softmax must be divided by the sum."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.mean(-1, keepdim=True)


def running_sum(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.cumsum(-1)


def maximum_not_undone(x: Tensor) -> Tensor:
    """Subtracted above the line, not below it."""
    return torch.exp(x - x.amax(-1, keepdim=True)) / x.exp().sum(-1, keepdim=True)


def maximum_of_other_axis(x: Tensor) -> Tensor:
    """The row's maximum does not cancel in the column's sum: a softmax of the difference it is, of x not."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-2, keepdim=True)


def sum_of_another(x: Tensor, y: Tensor) -> Tensor:
    return x.exp() / y.exp().sum(-1, keepdim=True)


def base_two(x: Tensor) -> Tensor:
    """No log2(e): the softmax of x ln 2 it may be counted as, of x not."""
    e = torch.exp2(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def half_the_logsumexp(x: Tensor) -> Tensor:
    return torch.exp(x - 0.5 * torch.logsumexp(x, -1, keepdim=True))


def stable_max(x: Tensor) -> Tensor:
    """x + 1 above zero, 1 / (1 - x) below, over the sum."""
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    return s / s.sum(-1, keepdim=True)


def sparse(x: Tensor) -> Tensor:
    """Sparsemax: a projection on the simplex."""
    z = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    total = z.cumsum(-1) - 1
    support = (k * z > total).sum(-1, keepdim=True)
    return (x - total.gather(-1, support - 1) / support).clamp_min(0)


# -- almost attention ----------------------------------------------------------------------------------------


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT / ROOT - math.log(LENGTH)) @ v


def scale_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT, dim=-1) / ROOT) @ v


def capped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma2: 20 tanh(scores / 20)."""
    scores = q @ k.mT * DIM**-0.5
    return (torch.tanh(scores / 20.0) * 20.0).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slot attention's first half: the queries compete for a key."""
    return torch.softmax(q @ k.mT / ROOT, dim=-2) @ v


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over queries, then weights over keys made to sum to one."""
    attn = torch.softmax(q @ k.mT / ROOT, dim=-2) + 1e-8
    return attn / attn.sum(dim=-1, keepdim=True) @ v


def transposed_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / ROOT, dim=-1).mT @ v


def mask_times_scores(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A masked score of zero still has its weight."""
    return torch.softmax(q @ k.mT / ROOT * keep, dim=-1) @ v


def mask_after_softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The rows no longer sum to one."""
    return (torch.softmax(q @ k.mT / ROOT, dim=-1) * keep) @ v


def tiny_fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """masked_fill(mask == 0, 1e-20): a zero where minus infinity was meant."""
    return (q @ k.mT / ROOT).masked_fill(keep == 0, 1e-20).softmax(-1) @ v


def temperature_per_pair(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A factor for each query and key: no scale, no bias can say it."""
    factor = 1.0 + torch.arange(LENGTH)[:, None] * torch.arange(LENGTH) / LENGTH
    return torch.softmax(q @ k.mT / ROOT * factor.to(q.dtype), dim=-1) @ v


def squared_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / ROOT).square(), dim=-1) @ v


def absolute_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / ROOT).abs(), dim=-1) @ v


def one_more_than_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax off by one inside an attention."""
    e = torch.exp(q @ k.mT / ROOT)
    return e / (1 + e.sum(-1, keepdim=True)) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of q over channels, of k over positions: two softmaxes and no attention."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def relu_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q @ k.mT / ROOT) / LENGTH @ v


def affine_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """alpha times the probabilities plus beta."""
    return (0.8 * torch.softmax(q @ k.mT / ROOT, dim=-1) + 0.05) @ v


class Sinks(nn.Module):
    """gpt-oss: a learned logit for each head takes its share and is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS) + 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / ROOT
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        combined = torch.cat([scores, sinks], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        return F.softmax(combined, dim=-1)[..., :-1] @ v


class TalkingHeads(nn.Module):
    """The heads' scores are mixed before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HEADS, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.mix((q @ k.mT / ROOT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ v


class DropoutOn(nn.Module):
    """In training: the probabilities are dropped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dropout(torch.softmax(q @ k.mT / ROOT, dim=-1)) @ v


def dropout_forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """training=True whatever the mode of the module."""
    return F.dropout(torch.softmax(q @ k.mT / ROOT, dim=-1), p=0.25, training=True) @ v


def _softmax(m: Any, x: Tensor, *_: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def _columns(m: Any, x: Tensor) -> Tensor:
    return F.softmax(x, dim=-2)


def _attention(m: Any, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _masked(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.bool())


def _miss(
    make: Callable[[], nn.Module], name: str, why: str | None, poses_as: Reference, **given: Any
) -> NearMiss:
    why = " ".join((why or name.replace("_", " ")).split())
    return NearMiss(name="near_" + name, make=make, why=why, poses_as=poses_as, **given)


def _scores() -> tuple[Tensor, ...]:
    return (1.5 * torch.randn(2, 5, 7) + 0.3,)


def _soft(function: Callable[..., Tensor], poses_as: Reference = _softmax, **given: Any) -> NearMiss:
    said: dict[str, Any] = dict(forbidden=SOFTMAX, inputs=_scores)
    name = "softmax_" + named(function)
    return _miss(lambda: Stateless(function), name, function.__doc__, poses_as, **(said | given))


def _qkv() -> tuple[Tensor, ...]:
    return heads(length=LENGTH), heads(length=LENGTH), heads(length=LENGTH)


def _keep() -> tuple[Tensor, ...]:
    keep = (torch.rand(2, 1, LENGTH, LENGTH) > 0.4) | torch.eye(LENGTH, dtype=torch.bool)
    return (*_qkv(), keep.float())


def _attends(make: Callable[..., Any], poses_as: Reference = _attention, **given: Any) -> NearMiss:
    said: dict[str, Any] = dict(forbidden=ATTENTION, inputs=_qkv)
    module = make if isinstance(make, type) else lambda: Stateless(make)
    return _miss(module, "attention_" + named(make), make.__doc__, poses_as, **(said | given))


def _two_scores() -> tuple[Tensor, ...]:
    return torch.randn(2, 5, 7), torch.randn(2, 5, 7)


NEAR_MISSES: tuple[NearMiss, ...] = (
    _soft(off_by_one),
    _soft(off_by_one_stable),
    _soft(one_added_after_the_maximum),
    _soft(eps_in_the_denominator),
    _soft(sigmoids_over_their_sum),
    _soft(softplus_over_sum),
    _soft(squares_over_sum),
    _soft(exp_minus_one),
    _soft(absolute_below_only),
    _soft(over_the_largest),
    _soft(over_the_mean, forbidden=ATTENTION),
    _soft(running_sum),
    _soft(maximum_not_undone),
    _soft(maximum_of_other_axis, _columns, forbidden=ATTENTION),
    _soft(sum_of_another, inputs=_two_scores),
    _soft(base_two, forbidden=ATTENTION),
    _soft(half_the_logsumexp),
    _soft(stable_max),
    _soft(sparse),
    _attends(sigmoid_attention, forbidden=SOFTMAX),
    _attends(scale_after_softmax),
    _attends(capped_scores),
    _attends(over_queries),
    _attends(slots),
    _attends(transposed_probabilities),
    _attends(mask_times_scores, _masked, inputs=_keep),
    _attends(mask_after_softmax, _masked, inputs=_keep),
    _attends(tiny_fill, _masked, inputs=_keep),
    _attends(temperature_per_pair),
    _attends(squared_scores),
    _attends(absolute_scores),
    _attends(one_more_than_the_sum, forbidden=SOFTMAX),
    _attends(linear_attention, forbidden=SOFTMAX),
    _attends(efficient_attention),
    _attends(relu_scores, forbidden=SOFTMAX),
    _attends(affine_scaled),
    _attends(Sinks),
    _attends(TalkingHeads),
    _attends(DropoutOn, random=True, training=True),
    _attends(dropout_forced, random=True),
)
