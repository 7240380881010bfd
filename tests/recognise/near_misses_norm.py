"""Almost LayerNorm, almost RMSNorm, almost a division by the Euclidean norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, NearMiss, Reference, Stateless, named, rows

EPS = 1e-5
STANDARD = frozenset({"layer_norm", "group_norm", "instance_norm", "batch_norm"})
LENGTHS = frozenset({"rms_norm", "l2_norm", "crms_norm"})
NORMS = STANDARD | LENGTHS


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _var(x: Tensor) -> Tensor:
    return x.var(-1, keepdim=True, unbiased=False)


# -- almost LayerNorm ----------------------------------------------------------------------------------------


class UnbiasedVariance(Affine):
    """Bessel's correction inside the root."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - _mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + self.eps) * self.weight + self.bias


class AnnotatedTransformer(Affine):
    """harvardnlp's: unbiased, eps added to the deviation."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


class PatchTarget(Affine):
    """MAE and Hiera normalise their target patches so: unbiased, eps inside, no affine part."""

    eps, affine = 1e-6, "none"

    def forward(self, target: Tensor) -> Tensor:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        return (target - mean) / (var + self.eps) ** 0.5


class AdaIn(nn.Module):
    """Huang and Belongie: unbiased variance, gain and shift are the statistics of another picture."""

    eps = 1e-5

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        style_std, style_mean = self._moments(style)
        std, mean = self._moments(content)
        return (content - mean.expand_as(content)) / std.expand_as(content) * style_std + style_mean

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, c = x.shape[:2]
        var = x.view(n, c, -1).var(dim=2) + self.eps
        return var.sqrt().view(n, c, 1, 1), x.view(n, c, -1).mean(dim=2).view(n, c, 1, 1)


class SimpleNorm(Affine):
    """timm's SimpleNorm: divided by the deviation, never centred."""

    affine = "weight"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.var(x, dim=-1, keepdim=True, unbiased=False) + self.eps) * self.weight


class CentredRms(Affine):
    """Centred above the line, the mean square of what was not centred below it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - _mean(x)) * torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True) + self.eps
        ) * self.weight + self.bias


class EpsTwice(Affine):
    """eps inside the root and once more outside."""

    eps = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return (x - _mean(x)) / (torch.sqrt(_var(x) + self.eps) + self.eps) * self.weight + self.bias


class NoRoot(Affine):
    """Divided by the variance."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - _mean(x)) / (_var(x) + self.eps) * self.weight + self.bias


class GainBeforeMean(Affine):
    """The gain is in the statistics, not in what they are applied to."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return (x - _mean(y)) / torch.sqrt(_var(y) + self.eps) + self.bias


def mean_absolute_deviation(x: Tensor) -> Tensor:
    d = x - _mean(x)
    return d / (d.abs().mean(-1, keepdim=True) + EPS)


def median_subtracted(x: Tensor) -> Tensor:
    return (x - x.median(-1, keepdim=True).values) / torch.sqrt(_var(x) + EPS)


def variance_about_median(x: Tensor) -> Tensor:
    median = x.median(-1, keepdim=True).values
    return (x - _mean(x)) * torch.rsqrt((x - median).pow(2).mean(-1, keepdim=True) + EPS)


def variance_about_another_mean(x: Tensor, y: Tensor) -> Tensor:
    var = (x - _mean(y)).pow(2).mean(-1, keepdim=True)
    return (x - _mean(x)) / torch.sqrt(var + EPS)


def mean_of_another(x: Tensor, y: Tensor) -> Tensor:
    return (x - _mean(y)) / torch.sqrt(_var(x) + EPS)


def variance_of_another(x: Tensor, y: Tensor) -> Tensor:
    return (x - _mean(x)) * torch.rsqrt(_var(y) + EPS)


def applied_to_another(x: Tensor, y: Tensor) -> Tensor:
    """The statistics of x standardise y."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (y - mean) * torch.rsqrt(var + EPS)


def other_axis_for_the_variance(x: Tensor) -> Tensor:
    return (x - _mean(x)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + EPS)


def more_axes_for_the_variance(x: Tensor) -> Tensor:
    return (x - _mean(x)) * torch.rsqrt(x.var((1, 2), keepdim=True, unbiased=False) + EPS)


def square_forgotten(x: Tensor) -> Tensor:
    """E[x^2] - E[x]."""
    return (x - _mean(x)) * torch.rsqrt((x.square().mean(-1, keepdim=True) - _mean(x)).abs() + EPS)


def squares_added(x: Tensor) -> Tensor:
    """E[x^2] + E[x]^2."""
    return (x - _mean(x)) * torch.rsqrt(x.square().mean(-1, keepdim=True) + _mean(x).square() + EPS)


def variance_capped(x: Tensor) -> Tensor:
    """A ceiling that bites."""
    return (x - _mean(x)) * torch.rsqrt(_var(x).clamp(max=2.0) + EPS)


def eps_of_the_row(x: Tensor) -> Tensor:
    return (x - _mean(x)) / torch.sqrt(_var(x) + 0.1 * x.abs().amax(-1, keepdim=True))


def weighted_mean(x: Tensor) -> Tensor:
    """The channels do not count the same."""
    share = torch.softmax(torch.linspace(-1, 1, WIDTH, dtype=x.dtype), 0)
    d = x - (x * share).sum(-1, keepdim=True)
    return d / torch.sqrt((d * d * share).sum(-1, keepdim=True) + EPS)


def half_centred(x: Tensor) -> Tensor:
    """Half of the mean taken away above the line, all of it below."""
    return (x - 0.5 * _mean(x)) * torch.rsqrt(_var(x) + EPS)


def previous_statistics(x: Tensor) -> Tensor:
    """Each position by the statistics of the one before."""
    return (x - _mean(x).roll(1, 1)) * torch.rsqrt(_var(x).roll(1, 1) + EPS)


def cumulative(x: Tensor) -> Tensor:
    """Conv-TasNet's causal norm: the statistics of all positions so far."""
    n = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None] * x.shape[-1]
    mean = x.sum(-1, keepdim=True).cumsum(1) / n
    power = x.square().sum(-1, keepdim=True).cumsum(1) / n
    return (x - mean) / torch.sqrt(power - mean * mean + EPS)


def clipped_statistics(x: Tensor) -> Tensor:
    """Outliers are left out of the statistics."""
    c = x.clamp(-1.5, 1.5)
    return (x - _mean(c)) * torch.rsqrt(_var(c) + EPS)


def fourth_root(x: Tensor) -> Tensor:
    return (x - _mean(x)) * torch.pow(_var(x) + EPS, -0.25)


# -- almost RMSNorm ------------------------------------------------------------------------------------------


class PartialRms(Affine):
    """pRMSNorm: the mean square of the first half for all channels."""

    affine = "weight"

    def forward(self, x: Tensor) -> Tensor:
        part = x[..., : WIDTH // 2]
        return x * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class ElementWise(Affine):
    """ISRU: no mean is taken at all."""

    affine = "weight"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2) + 0.5) * self.weight


def mean_absolute_value(x: Tensor) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + EPS)


def mean_square_without_root(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS)


def gate_in_the_statistics(x: Tensor, gate: Tensor) -> Tensor:
    """The product's mean square, without the gate above the line."""
    return x * torch.rsqrt((x * F.silu(gate)).pow(2).mean(-1, keepdim=True) + EPS)


def mean_of_a_product(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.rsqrt((x * y).mean(-1, keepdim=True).abs() + EPS)


def rms_of_another(x: Tensor, y: Tensor) -> Tensor:
    return x / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + EPS)


def rms_of_other_axis(x: Tensor) -> Tensor:
    """Divided by the root mean square of the time axis and that of the channels together."""
    return x / (x.square().mean(1, keepdim=True).sqrt() + x.square().mean(-1, keepdim=True).sqrt())


def peak(x: Tensor) -> Tensor:
    return x / x.abs().amax(-1, keepdim=True).clamp_min(EPS)


def one_norm(x: Tensor) -> Tensor:
    return F.normalize(x, p=1.0, dim=-1)


def three_norm(x: Tensor) -> Tensor:
    return F.normalize(x, p=3.0, dim=-1)


def written_out_three_norm(x: Tensor) -> Tensor:
    return x / x.abs().pow(3).sum(-1, keepdim=True).pow(1 / 3)


def squared_length(x: Tensor) -> Tensor:
    """The inverse of a sphere."""
    return x / (x.norm(dim=-1, keepdim=True) ** 2 + EPS)


def one_plus_length(x: Tensor) -> Tensor:
    return x / (1.0 + torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2).pow(0.25)


def squash(x: Tensor) -> Tensor:
    """Capsules: the length n becomes n^2 / (1 + n^2)."""
    square = x.pow(2).sum(-1, keepdim=True)
    return x * square.sqrt() / (1 + square)


def clipped_length(x: Tensor) -> Tensor:
    """Rows longer than the threshold are shortened to it, the others left alone."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (4.0 / (norm + 1e-6)).clamp(max=1.0)


def response(x: Tensor) -> Tensor:
    """ConvNeXt V2's global response: multiplied by its share of the length, not divided by the length."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    share = length / (length.mean(-1, keepdim=True) + 1e-6)
    return x + 0.3 * (x * share) + 0.1


def other_divisor(x: Tensor) -> Tensor:
    """The sum of squares over n - 1: our rms_norm with a gain and another eps, torch's operator it is not."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / (WIDTH - 1) + EPS)


# -- what they pose as ---------------------------------------------------------------------------------------


def _ln(m: Any, x: Tensor, *_: Tensor) -> Tensor:
    return F.layer_norm(
        x, (WIDTH,), getattr(m, "weight", None), getattr(m, "bias", None), getattr(m, "eps", EPS)
    )


def _other_ln(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(y, (WIDTH,), eps=EPS)


def _rms(m: Any, x: Tensor, *_: Tensor) -> Tensor:
    return references.rms_norm(m, x) if hasattr(m, "eps") else F.rms_norm(x, (WIDTH,), eps=EPS)


def _instance(m: Any, x: Tensor, style: Tensor) -> Tensor:
    std, mean = torch.std_mean(style, (2, 3), keepdim=True)
    return F.instance_norm(x) * std + mean


def _unit(m: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _miss(
    make: Callable[[], nn.Module], name: str, why: str | None, poses_as: Reference, **given: Any
) -> NearMiss:
    said: dict[str, Any] = dict(forbidden=NORMS, inputs=lambda: (rows(2, 5, WIDTH), rows(2, 5, WIDTH)))
    why = " ".join((why or name.replace("_", " ")).split())
    return NearMiss(name="near_" + name, make=make, why=why, poses_as=poses_as, **(said | given))


def _one() -> tuple[Tensor, ...]:
    return (rows(2, 5, WIDTH),)


def _class(make: type[Affine], poses_as: Reference = _ln, **given: Any) -> NearMiss:
    return _miss(make, named(make), make.__doc__, poses_as, inputs=_one, **given)


def _of(function: Callable[..., Tensor], poses_as: Reference = _ln, **given: Any) -> NearMiss:
    two = function.__code__.co_argcount == 2
    inputs = {} if two else {"inputs": _one}
    return _miss(lambda: Stateless(function), named(function), function.__doc__, poses_as, **inputs, **given)


NEAR_MISSES: tuple[NearMiss, ...] = (
    _class(UnbiasedVariance),
    _class(AnnotatedTransformer),
    _class(PatchTarget),
    _miss(AdaIn, "ada_in", AdaIn.__doc__, _instance, inputs=lambda: (rows(2, WIDTH, 3, 5), rows(2, WIDTH, 4, 2))),
    _class(SimpleNorm),
    _class(CentredRms),
    _class(EpsTwice),
    _class(NoRoot),
    _class(GainBeforeMean),
    _of(mean_absolute_deviation),
    _of(median_subtracted),
    _of(variance_about_median),
    _of(variance_about_another_mean),
    _of(mean_of_another),
    _of(variance_of_another),
    _of(applied_to_another, _other_ln),
    _of(other_axis_for_the_variance),
    _of(more_axes_for_the_variance),
    _of(square_forgotten),
    _of(squares_added),
    _of(variance_capped),
    _of(eps_of_the_row),
    _of(weighted_mean),
    _of(half_centred),
    _of(previous_statistics),
    _of(cumulative),
    _of(clipped_statistics),
    _of(fourth_root),
    _class(PartialRms, _rms),
    _class(ElementWise, _rms),
    _of(mean_absolute_value, _rms),
    _of(mean_square_without_root, _rms),
    _of(gate_in_the_statistics, _rms),
    _of(mean_of_a_product, _rms),
    _of(rms_of_another, _rms),
    _of(rms_of_other_axis, _rms),
    _of(peak, _unit),
    _of(one_norm, _unit),
    _of(three_norm, _unit),
    _of(written_out_three_norm, _unit),
    _of(squared_length, _unit),
    _of(one_plus_length, _unit),
    _of(squash, _unit),
    _of(clipped_length, _unit),
    _of(response, _unit),
    _of(other_divisor, _rms, forbidden=STANDARD, torch_ops=("rms_norm",)),
)
