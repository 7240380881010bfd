"""Almost BatchNorm, GroupNorm or InstanceNorm; almost a normalised weight; almost DyT, Derf, GELU, SiLU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, NearMiss, Reference, Stateless, gain, named, rows
from .near_misses_norm import EPS, NORMS, STANDARD
from .spellings_batch_norm import Frozen
from .spellings_group_norm import GROUPS, Grouped

BATCH = frozenset({"batch_norm"})
WEIGHTS = frozenset({"weight_norm", "spectral_norm", "weight_standardization"})
POINTWISE = frozenset({"dyt", "derf"})
ACTIVATIONS = frozenset({"gelu", "silu"})
SHAPE = (1, -1, 1, 1)


# -- statistics of the batch ---------------------------------------------------------------------------------


class TrainingMode(nn.Module):
    """BatchNorm in training: the statistics are those of the batch, and the module changes."""

    eps = EPS

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class WithoutStatistics(nn.Module):
    """track_running_stats=False: batch statistics in eval mode too."""

    eps = EPS

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH, track_running_stats=False)
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class BatchStatistics(Frozen):
    """Written out over batch and space."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        y = (x - mean) / torch.sqrt(var + self.eps)
        return y * self.weight.view(SHAPE) + self.bias.view(SHAPE)


class MixedStatistics(Frozen):
    """alpha-BN: nine tenths stored, one tenth of the present batch."""

    def forward(self, x: Tensor) -> Tensor:
        mean = 0.9 * self.running_mean + 0.1 * x.mean((0, 2, 3))
        var = 0.9 * self.running_var + 0.1 * x.var((0, 2, 3), unbiased=False)
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


class StoredMeanOnly(Frozen):
    """The mean is stored, the variance is the input's."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - self.running_mean.view(SHAPE)
        return d * torch.rsqrt(d.square().mean((2, 3), keepdim=True) + self.eps) * self.weight.view(SHAPE)


class ChannelAffine(Affine):
    """A gain and a shift for each channel, and no statistics: LayerScale."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(SHAPE) + self.bias.view(SHAPE)


# -- groups --------------------------------------------------------------------------------------------------


class InterleavedGroups(Grouped):
    """Every fourth channel is a group: torch's operator takes neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        g = x.reshape(x.shape[0], -1, GROUPS, *x.shape[2:])
        var, mean = torch.var_mean(g, (1, 3, 4), correction=0, keepdim=True)
        y = ((g - mean) / torch.sqrt(var + self.eps)).reshape(x.shape)
        return y * self.weight.view(SHAPE) + self.bias.view(SHAPE)


class GroupMeanChannelVariance(Grouped):
    """The mean of a group, the variance of a channel."""

    def forward(self, x: Tensor) -> Tensor:
        g = x.unflatten(1, (GROUPS, -1))
        d = g - g.mean((2, 3, 4), keepdim=True)
        y = (d * torch.rsqrt(g.var((3, 4), keepdim=True, unbiased=False) + self.eps)).flatten(1, 2)
        return y * self.weight.view(SHAPE) + self.bias.view(SHAPE)


class InstanceMeanLayerVariance(Grouped):
    """The mean over space, the variance over space and channels."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean((2, 3), keepdim=True)
        y = d * torch.rsqrt(x.var((1, 2, 3), keepdim=True, unbiased=False) + self.eps)
        return y * self.weight.view(SHAPE) + self.bias.view(SHAPE)


# -- weights -------------------------------------------------------------------------------------------------


class _Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.v = gain(6, 1), nn.Parameter(torch.randn(6, WIDTH) + 0.5)


class OneNormWeight(_Weight):
    """Divided by the sum of magnitudes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.abs().sum(1, keepdim=True))


class OtherAxisWeight(_Weight):
    """A gain for each row, the squared length of each column."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.norm(dim=0, keepdim=True).square())


class CentredWeight(_Weight):
    """Only the mean is taken away."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * (self.v - self.v.mean(1, keepdim=True)))


class ScaledWeight(_Weight):
    """Divided by its deviation, not centred."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.v / (self.v.std(1, keepdim=True) + EPS))


class LargestRowWeight(_Weight):
    """Divided by the largest sum of a row: a bound on the spectral norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.v / self.v.abs().sum(1).amax())


# -- pointwise -----------------------------------------------------------------------------------------------


class SoftSign(Affine):
    """alpha x / (1 + |alpha x|) in the place of tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(0.4 * x) * self.weight + self.bias


class ArcTangent(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(0.4 * x) * self.weight + self.bias


class HardTanh(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(0.4 * x) * self.weight + self.bias


class TanhGate(Affine):
    """x tanh(alpha x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(0.4 * x) * self.weight + self.bias


def plain_tanh(x: Tensor) -> Tensor:
    """An activation: no parameter of a norm."""
    return torch.tanh(x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): near GELU to two digits."""
    return x * torch.sigmoid(1.702 * x)


def other_cubic(x: Tensor) -> Tensor:
    """0.045 for 0.044715."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.045 * x**3)))


def distribution_function(x: Tensor) -> Tensor:
    """GELU's factor without x."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2.0)))


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


def hard_swish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def gated_linear_unit(x: Tensor) -> Tensor:
    """The sigmoid of one half times the other."""
    left, right = x.chunk(2, -1)
    return left * torch.sigmoid(right)


# -- what they pose as ---------------------------------------------------------------------------------------


def _torch_batch_norm(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    stored = m if n.running_mean is None else n
    return F.batch_norm(x, stored.running_mean, stored.running_var, n.weight, n.bias, eps=n.eps)


def _bias_free(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, eps=m.eps)


def _standard_batch_norm(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, x.new_zeros(WIDTH), x.new_ones(WIDTH), m.weight, m.bias, eps=m.eps)


def _weight_norm(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch._weight_norm(m.v, m.g, 0))


def _standardization(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.g * F.layer_norm(m.v, (WIDTH,), eps=EPS))


def _unscaled_standardization(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, F.layer_norm(m.v, (WIDTH,), eps=EPS))


def _spectral(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.v / torch.linalg.matrix_norm(m.v, 2))


def _dyt(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(0.4 * x) * m.weight + m.bias


def _derf(m: Any, x: Tensor) -> Tensor:
    return torch.erf(x)


def _gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(x)


def _tanh_gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _silu(m: Any, x: Tensor) -> Tensor:
    return F.silu(x)


def _silu_of_half(m: Any, x: Tensor) -> Tensor:
    return F.silu(x[..., : WIDTH // 2])


def _image() -> tuple[Tensor, ...]:
    return (rows(3, WIDTH, 3, 5),)


def _tokens() -> tuple[Tensor, ...]:
    return (rows(2, 5, WIDTH),)


def _miss(make: Callable[..., Any], forbidden: frozenset[str], poses_as: Reference, **given: Any) -> NearMiss:
    module = make if isinstance(make, type) else lambda: Stateless(make)
    name = named(make)
    why = " ".join((make.__doc__ or name.replace("_", " ")).split())
    said: dict[str, Any] = dict(name="near_" + name, inputs=_tokens)
    return NearMiss(make=module, forbidden=forbidden, poses_as=poses_as, why=why, **(said | given))


NEAR_MISSES: tuple[NearMiss, ...] = (
    _miss(TrainingMode, NORMS, _torch_batch_norm, inputs=_image, training=True),
    _miss(WithoutStatistics, NORMS, _torch_batch_norm, inputs=_image),
    _miss(BatchStatistics, NORMS, references.batch_norm, inputs=_image),
    _miss(MixedStatistics, BATCH, references.batch_norm, inputs=_image),
    _miss(StoredMeanOnly, STANDARD, _bias_free, inputs=_image),
    _miss(ChannelAffine, NORMS, _standard_batch_norm, inputs=_image),
    _miss(InterleavedGroups, frozenset({"group_norm"}), references.group_norm, inputs=_image),
    _miss(GroupMeanChannelVariance, NORMS, references.group_norm, inputs=_image),
    _miss(InstanceMeanLayerVariance, NORMS, references.instance_norm, inputs=_image),
    _miss(OneNormWeight, WEIGHTS, _weight_norm),
    _miss(OtherAxisWeight, WEIGHTS, _weight_norm),
    _miss(CentredWeight, WEIGHTS, _standardization),
    _miss(ScaledWeight, WEIGHTS, _unscaled_standardization),
    _miss(LargestRowWeight, WEIGHTS, _spectral),
    _miss(SoftSign, POINTWISE, _dyt),
    _miss(ArcTangent, POINTWISE, _dyt),
    _miss(HardTanh, POINTWISE, _dyt),
    _miss(TanhGate, POINTWISE, _dyt),
    _miss(plain_tanh, POINTWISE, _derf),
    _miss(quick_gelu, frozenset({"gelu"}), _gelu),
    _miss(other_cubic, ACTIVATIONS, _tanh_gelu),
    _miss(distribution_function, ACTIVATIONS, _gelu),
    _miss(mish, ACTIVATIONS, _silu),
    _miss(hard_swish, ACTIVATIONS, _silu),
    _miss(gated_linear_unit, ACTIVATIONS, _silu_of_half),
)
