"""Softmax outside attention: routers, pooling, heads; written out; with log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import WIDTH, Outputs, Reference, Spelling, Stateless, named, rows

TILE = 7


# -- torch's own ---------------------------------------------------------------------------------------------


def softmax_module() -> nn.Module:
    return nn.Softmax(dim=-1)


def functional_over_channels(x: Tensor) -> Tensor:
    return F.softmax(x, dim=1)


def router(x: Tensor) -> Tensor:
    """Mixture of experts in bfloat16: float32 by the operator's dtype argument, cast back."""
    return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def router_float(x: Tensor) -> Tensor:
    return torch.softmax(x.float(), dim=-1).type_as(x)


def heat_map(x: Tensor) -> Tensor:
    """Two axes folded into one: a heat map."""
    n, c, h, w = x.shape
    return x.view(n, c, -1).softmax(-1).view(n, c, h, w)


def softmin(x: Tensor) -> Tensor:
    return F.softmin(x, dim=-1)


def temperature(x: Tensor) -> Tensor:
    return ((x / 0.7) + 0.0).softmax(dim=-1)


def transposed(x: Tensor) -> Tensor:
    """Split attention: the radix axis moved back and forth."""
    return F.softmax(x.transpose(1, 2), dim=-1).transpose(1, 2)


# -- written out ---------------------------------------------------------------------------------------------


def exp_over_sum(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(dim=-1, keepdim=True)


def max_subtracted(x: Tensor) -> Tensor:
    """Every course's stable softmax."""
    x_max = torch.max(x, dim=-1, keepdim=True).values
    e_x = torch.exp(x - x_max)
    return e_x / torch.sum(e_x, dim=-1, keepdim=True)


def amax_detached(x: Tensor) -> Tensor:
    x = x - x.amax(dim=1, keepdim=True).detach()
    e = x.exp()
    return e * e.sum(dim=1, keepdim=True).reciprocal()


def in_place(x: Tensor) -> Tensor:
    y = x - x.max(dim=-1, keepdim=True)[0]
    y.exp_()
    y /= y.sum(-1, keepdim=True)
    return y


def global_maximum(x: Tensor) -> Tensor:
    """One maximum for the whole tensor: any shift of a row will do."""
    e = torch.exp(x - x.max())
    return e / e.sum(-1, keepdim=True)


def without_keepdim(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(-1).values.unsqueeze(-1))
    return e / e.sum(-1)[..., None]


def base_two(x: Tensor) -> Tensor:
    """As kernels do: exp2 of x log2(e)."""
    y = torch.exp2((x - x.amax(-1, keepdim=True)) * math.log2(math.e))
    return y / y.sum(-1, keepdim=True)


def log_softmax_exp(x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=-1).exp()


def minus_logsumexp(x: Tensor) -> Tensor:
    return torch.exp(x - torch.logsumexp(x, dim=-1, keepdim=True))


def sum_by_ones(x: Tensor) -> Tensor:
    """The denominator by a product with a vector of ones."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / (e @ torch.ones(e.shape[-1], 1, dtype=e.dtype))


def sum_by_einsum(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, True)).exp()
    return torch.einsum("bti,bt->bti", e, 1.0 / torch.einsum("bti->bt", e))


def normalized_exp(x: Tensor) -> Tensor:
    """F.normalize with p=1 of positive numbers."""
    return F.normalize(torch.exp(x - x.amax(-1, keepdim=True)), p=1.0, dim=-1)


def upcast_written_out(x: Tensor) -> Tensor:
    h = x.float()
    e = torch.exp(h - h.amax(dim=-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)).to(x.dtype)


def two_axes(x: Tensor) -> Tensor:
    """Normalised over both axes of a map."""
    e = torch.exp(x - x.amax(dim=(-2, -1), keepdim=True))
    return e / e.sum(dim=(-2, -1), keepdim=True)


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """A pointer's scores, the forbidden ones removed first."""
    x = torch.where(keep, x, torch.full_like(x, float("-inf")))
    return torch.softmax(x, dim=-1)


class AttentivePooling(nn.Module):
    """Speech: weights over time, then a weighted mean; or an attention of one learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.w(x).squeeze(-1)
        e = torch.exp(scores - scores.max(dim=1, keepdim=True)[0])
        weights = (e / e.sum(dim=1, keepdim=True)).unsqueeze(-1)
        return torch.sum(x * weights, dim=1)


# -- logarithms ----------------------------------------------------------------------------------------------


def log_of_softmax(x: Tensor) -> Tensor:
    return torch.log(torch.softmax(x, dim=-1))


def x_minus_logsumexp(x: Tensor) -> Tensor:
    return x - torch.logsumexp(x, -1, keepdim=True)


def log_softmax_written_out(x: Tensor) -> Tensor:
    shifted = x - x.max(dim=-1, keepdim=True).values
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def logsumexp_written_out(x: Tensor) -> Tensor:
    top = x.amax(dim=-1, keepdim=True)
    return (top + torch.log(torch.sum(torch.exp(x - top), dim=-1, keepdim=True))).squeeze(-1)


def logsumexp_plain(x: Tensor) -> Tensor:
    return x.exp().sum(-1).log()


def _softmax(axis: int, scale: float = 1.0) -> Reference:
    return lambda m, x: F.softmax(x * scale, dim=axis)


def _two_axes(m: Any, x: Tensor) -> Tensor:
    return F.softmax(x.flatten(-2), dim=-1).view_as(x)


def _masked(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    return F.softmax(x.masked_fill(~keep, float("-inf")), dim=-1)


def _pooling(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("btd,bt->bd", x, F.softmax(m.w(x)[..., 0], dim=1))


def _log_softmax(m: Any, x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=-1)


def _logsumexp(m: Any, x: Tensor) -> Tensor:
    return torch.logsumexp(x, dim=-1)


STABLE = (1.0, 1e-3, 30.0, 0.0)
PLAIN = (1.0, 1e-3, 10.0, 0.0)  # exp of the inputs themselves stays finite


def _record(make: Callable[[], nn.Module], name: str, **given: Any) -> Spelling:
    said: dict[str, Any] = dict(kind="softmax", axes=(-1,), magnitudes=STABLE, reference=_softmax(-1))
    said |= dict(inputs=lambda: (2 * torch.randn(2, 5, TILE) + torch.randn(2, 5, 1),))
    return Spelling(make=make, name=name, **(said | given))


def _of(function: Callable[..., Outputs], **given: Any) -> Spelling:
    return _record(lambda: Stateless(function), "softmax_" + named(function), **given)


def _image() -> tuple[Tensor, ...]:
    return (3 * torch.randn(2, 4, 3, 5),)


def _mask() -> tuple[Tensor, ...]:
    return 3 * torch.randn(2, 5, TILE), torch.arange(TILE) < torch.tensor([3, 4, 5, 6, 7])[:, None]


SPELLINGS: tuple[Spelling, ...] = (
    _record(softmax_module, "softmax_module"),
    _of(functional_over_channels, axes=(-3,), inputs=_image, reference=_softmax(1)),
    _of(router, dtype=torch.bfloat16),
    _of(router_float, dtype=torch.bfloat16),
    _of(heat_map, outer_axes=(-2, -1), inputs=_image, reference=_two_axes),
    _of(softmin, reference=_softmax(-1, -1.0)),
    _of(temperature, reference=_softmax(-1, 1 / 0.7)),
    _of(transposed, outer_axes=(-2,), reference=_softmax(1)),
    _of(exp_over_sum, magnitudes=PLAIN),
    _of(max_subtracted),
    _of(amax_detached, axes=(-2,), reference=_softmax(1)),
    _of(in_place),
    _of(global_maximum),
    _of(without_keepdim),
    _of(base_two),
    _of(log_softmax_exp),
    _of(minus_logsumexp),
    _of(sum_by_ones),
    _of(sum_by_einsum),
    _of(normalized_exp),
    _of(upcast_written_out, dtype=torch.float16),
    _of(two_axes, axes=(-2, -1), inputs=_image, reference=_two_axes),
    _of(masked, inputs=_mask, reference=_masked),
    _record(
        AttentivePooling,
        "softmax_attentive_pooling",
        or_kinds=("attention",),
        inputs=lambda: (rows(2, 5, WIDTH),),
        reference=_pooling,
    ),
    _of(log_of_softmax, kind="log_softmax", or_kinds=("softmax",), reference=_log_softmax),
    _of(x_minus_logsumexp, kind="log_softmax", reference=_log_softmax),
    _of(log_softmax_written_out, kind="log_softmax", reference=_log_softmax),
    _of(logsumexp_written_out, kind="logsumexp", reference=_logsumexp),
    _of(logsumexp_plain, kind="logsumexp", magnitudes=PLAIN, reference=_logsumexp),
)
