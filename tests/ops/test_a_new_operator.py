"""A known function is one record: a norm that nobody has, added here, and everything that derives from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.ops import Operator, with_operator
from normfuse.ops.define import affine, narrowed, widened

EPS = 1e-4


def reference(
    x: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * x / cbrt(mean(|x|**3, axes) + eps) + bias."""
    wide = widened(x)
    y = wide / (wide.abs().pow(3).mean(list(axes), keepdim=True) + eps).pow(1 / 3)
    return affine(narrowed(y, x, weight), weight, bias, axes).to(x.dtype)


CUBIC = Operator(
    "cubic_norm",
    "(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor",
    reference,
    role="norm",
    kind="cubic_norm",
    source="nowhere",
    multiple=True,
    odd=True,
    homogeneous=True,
    bounded=True,
    each=6,
)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with with_operator(CUBIC):
        yield


class Spelt(nn.Module):
    """A linear before and a cubic norm behind it, however the subclass writes that."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.gain = nn.Parameter(torch.randn(8) + 2)
        self.shift = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x)) * self.gain
        return y if self.shift is None else y + self.shift

    def norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ByPow(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.abs().pow(3).mean(-1, keepdim=True) + EPS) ** (1 / 3)


class ByProducts(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        cube = torch.sqrt(x * x) * x.square()
        return x * (cube.sum(dim=-1, keepdim=True) / x.shape[-1] + EPS).pow(-1 / 3)


class ByLogarithm(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        mean = torch.einsum("bsc->bs", x.abs() ** 3)[..., None] / 8
        return x * torch.exp(-torch.log(mean + EPS) / 3)


class ByVectorNorm(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        total = torch.linalg.vector_norm(x, ord=3, dim=-1, keepdim=True) ** 3
        return x * torch.reciprocal((total / 8 + EPS) ** (1 / 3))


class FloorInside(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / x.abs().pow(3).mean(-1, keepdim=True).clamp_min(EPS) ** (1 / 3)


class EpsOutside(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.abs().pow(3).mean(-1, keepdim=True) ** (1 / 3) + EPS)


class FourthPower(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.abs().pow(4).mean(-1, keepdim=True) + EPS) ** (1 / 4)


class SignedCube(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.pow(3).mean(-1, keepdim=True).abs() + EPS) ** (1 / 3)


X = torch.randn(2, 5, 6) + 0.5
SPELLINGS = [ByPow, ByProducts, ByLogarithm, ByVectorNorm]


@pytest.mark.parametrize("spelt", SPELLINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_recognised_and_counted(spelt: type[Spelt], bias: bool) -> None:
    found = normfuse.inspect(spelt(bias=bias).eval(), (X,))
    assert found.count("cubic_norm") == len(found.patterns) == 1
    [pattern] = found.patterns
    assert (pattern.axes, pattern.eps) == ((-1,), EPS)
    assert pattern.affine == ("weight and bias" if bias else "weight")


@pytest.mark.parametrize("spelt", [FloorInside, EpsOutside, FourthPower, SignedCube])
def test_a_near_miss_is_not(spelt: type[Spelt]) -> None:
    assert normfuse.inspect(spelt().eval(), (X,)).count("cubic_norm") == 0
