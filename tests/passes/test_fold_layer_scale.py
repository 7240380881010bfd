"""fold_layer_scale: gains per channel behind linears and convolutions, through views and sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normfuse
from tests.passes.checking import (
    assert_idempotent,
    assert_mutant_fails,
    assert_same,
    images,
    ops,
    randomized,
    reasons,
    run,
)

PASS = "fold_layer_scale"


class Block(nn.Module):
    """x + gain * projection(x)."""

    def __init__(self, projection: nn.Module, *sizes: int, view: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.projection, self.gain, self.view = projection, nn.Parameter(torch.ones(sizes)), view

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.gain * self.view(self.projection(torch.tanh(x))))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a(torch.tanh(x)) + self.b(torch.sin(x))).flip(1) * self.gain


def tokens() -> Tensor:
    return torch.randn(2, 5, 6) + 0.4


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: Block(nn.Linear(6, 6), 6), tokens),
    "linear without bias": (lambda: Block(nn.Linear(6, 6, bias=False), 1, 1, 6), tokens),
    "conv": (lambda: Block(nn.Conv2d(6, 6, 3, padding=1), 6, 1, 1), lambda: images(6, 7, 8)),
    "depthwise": (lambda: Block(nn.Conv2d(6, 6, 3, padding=1, groups=6), 1, 6, 1, 1), lambda: images(6, 7, 8)),
    "norm between": (
        lambda: Block(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), 6, 1, 1), lambda: images(6, 7, 8)
    ),
    "view between": (
        lambda: Block(nn.Linear(6, 6), 6, 1, view=lambda y: y.transpose(1, 2).contiguous()),
        lambda: torch.randn(2, 6, 6) + 0.4,
    ),
    "sum": (Sum, tokens),
}  # fmt: skip


# --- fires, same function


@pytest.mark.parametrize("name", CASES)
def test_a_gain_goes_into_its_projection(name: str) -> None:
    make, example = CASES[name]
    optimized = run(randomized(make()), [example()], PASS)
    assert optimized.report.fired == {PASS: 1}, optimized.report.refusals
    assert not ops(optimized)["mul"] and not ops(optimized)["batch_norm"]
    assert_same(optimized)


# --- refuses


def test_a_gain_of_a_nonlinearity_stays() -> None:
    optimized = run(randomized(Block(nn.Tanh(), 6)), [tokens()], PASS)
    assert not optimized.report.fired
    assert "tanh" in reasons(optimized, PASS)


def test_a_gain_that_depends_on_the_input_stays() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * x.mean((0, 1))

    assert not run(randomized(Gated()), [tokens()], PASS).report.fired


def test_a_projection_that_is_read_elsewhere_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y * self.gain + torch.tanh(y)

    optimized = run(randomized(Read()), [tokens()], PASS)
    assert not optimized.report.fired
    assert "read elsewhere" in reasons(optimized, PASS)


def test_a_weight_of_two_calls_stays_unless_asked_for() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x) * self.gain))

    model, args = randomized(Twice()), (tokens(),)
    unasked = normfuse.optimize(model, args)
    assert PASS not in unasked.report.fired and "shared with another call site" in reasons(unasked, PASS)
    asked = run(model, args, PASS)
    assert asked.report.fired == {PASS: 1}
    assert_same(asked)


# --- a mutant fails, idempotent


def test_a_mutant_fails() -> None:
    assert_mutant_fails(randomized(CASES["linear"][0]()), [tokens()], PASS)


def test_a_second_run_finds_nothing() -> None:
    args = [tokens()]
    assert_idempotent(run(randomized(CASES["sum"][0]()), args, PASS), args, PASS)
