"""A number that recognition solves for is a constant of the graph: a learned one leaves the norm as it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.capture.export import capture
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.program import Program
from normfuse.pipeline.run import Pipeline
from normfuse.verification.numerics import EXACT

from .corpus import distance

WIDTH = 8


class Scalars(nn.Module):
    """Two learned numbers, a stored one, and a learned vector."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.31))
        self.b = nn.Parameter(torch.tensor(-0.7))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("stored", torch.tensor(0.03))
        self.register_buffer("variance", torch.rand(WIDTH) + 0.5)
        self.register_buffer("average", torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def _image(x: Tensor) -> Tensor:
    return x.reshape(2, 4, 2, 3, 8)[:, :, 0]


LEARNED: dict[str, Callable[[Scalars, Tensor], Tensor]] = {
    "eps_inside": lambda m, x: x * torch.rsqrt(_square(x) + m.a.abs()),
    "eps_inside_of_a_layer_norm": lambda m, x: _centred(x) / (_square(_centred(x)) + m.a.square()).sqrt() * m.gain,
    "eps_outside": lambda m, x: x / (_square(x).sqrt() + m.a.exp()),
    "eps_as_a_floor": lambda m, x: x / torch.maximum(x.norm(dim=-1, keepdim=True), m.a.abs()),
    "eps_of_a_float_and_a_parameter": lambda m, x: x * torch.rsqrt(_square(x) + 1e-3 * (1 + m.a.square())),
    "eps_from_the_input": lambda m, x: x[..., 1:] * torch.rsqrt(_square(x[..., 1:]) + x.mean().abs()),
    "eps_over_an_image": lambda m, x: _image(x) * (_image(x).square().mean((2, 3), keepdim=True) + m.a.abs()).rsqrt(),
    "two_gains": lambda m, x: _centred(x) / (_square(_centred(x)) + 1e-5).sqrt() * m.a * m.b,
    "gain_times_a_number": lambda m, x: x * (_square(x) + 1e-5).rsqrt() * m.gain * m.a,
    "gains_in_one_product": lambda m, x: m.b * (m.a * x) * ((x * x).mean(-1, True) + 1e-2).rsqrt(),
    "gain_and_a_learned_offset": lambda m, x: x * (_square(x) + 1e-5).rsqrt() * m.gain * m.a + m.shift * m.b,
    "temperature": lambda m, x: (x * m.a).exp() / (m.a * x).exp().sum(-1, keepdim=True),
    "temperature_that_is_clamped": lambda m, x: torch.exp(x / m.a) / torch.exp(x * (1 / m.a)).sum(-1, keepdim=True),
    "alpha_of_two": lambda m, x: m.gain * torch.tanh(m.a * x * m.b) + m.shift,
    "alpha_and_two_gains": lambda m, x: m.b * (m.a * torch.erf(m.a * x)),
    "alpha_as_a_sum": lambda m, x: torch.tanh((m.a + m.b) * x) * m.gain,
    "frozen_by_a_learned_eps": lambda m, x: (x - m.average) * torch.rsqrt(m.variance + m.a.abs()) * m.gain + m.shift,
}
CONSTANT: dict[str, tuple[str, float, Callable[[Scalars, Tensor], Tensor]]] = {
    "eps_in_a_buffer": ("rms_norm", 0.03, lambda m, x: x * torch.rsqrt(_square(x) + m.stored)),
    "eps_in_a_tensor": ("rms_norm", 0.02, lambda m, x: x * torch.rsqrt(_square(x) + torch.tensor(0.02))),
    "eps_beside_a_learned_number": ("rms_norm", 0.04, lambda m, x: m.a * (x * torch.rsqrt(_square(x) + 0.04))),
    "eps_in_a_frozen_norm": (
        "batch_norm", 0.03, lambda m, x: (x - m.average) * torch.rsqrt(m.variance + m.stored) * m.gain + m.shift
    ),
}  # fmt: skip


def _example() -> Tensor:
    return torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(3)) + 0.4


def _model(function: Callable[[Scalars, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(11)
    return Scalars(function).eval()


def _raised(model: nn.Module) -> tuple[Program, Program]:
    captured = capture(model, (_example(),), check_training=False)
    return captured, Pipeline(captured, (), named=False).raise_()[0]


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_number_is_not_solved_for(name: str) -> None:
    captured, raised = _raised(_model(LEARNED[name]))
    for magnitude in (1.0, 1e-2, 10.0):
        leaves = [_example() * magnitude]
        before, after = run_float64(captured, [leaves])[0], run_float64(raised, [leaves])[0]
        assert all(distance(a, b) < EXACT for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["eps_inside", "two_gains", "frozen_by_a_learned_eps"])
def test_without_verification_the_result_is_right_too(name: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), _model(LEARNED[name])).eval()
    found = normfuse.optimize(model, (_example(),), verify=False)
    torch.testing.assert_close(found(_example()), model(_example()), rtol=1e-4, atol=1e-5)
    assert not normfuse.optimize(model, (_example(),)).report.rolled_back


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_is(name: str) -> None:
    kind, eps, function = CONSTANT[name]
    [pattern] = normfuse.inspect(_model(function), (_example(),)).patterns
    assert pattern.kind == kind
    assert pattern.eps == pytest.approx(eps, rel=1e-6)


def test_two_frozen_norms_with_different_numbers_in_buffers() -> None:
    """They are spelt alike: a verdict that is shared must not share the number."""
    first, second = (_model(CONSTANT["eps_in_a_frozen_norm"][2]) for _ in range(2))
    second.stored.fill_(0.5)
    found = normfuse.inspect(nn.Sequential(first, nn.Linear(WIDTH, WIDTH), second).eval(), (_example(),))
    assert [p.eps for p in found.patterns] == pytest.approx([0.03, 0.5], rel=1e-6)
