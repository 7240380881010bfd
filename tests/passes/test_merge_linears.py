"""merge_linears: projections behind each other, and beside each other when asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

PASS = "merge_linears"


class Attention(nn.Module):
    """Grouped heads, one projection without a bias, and a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6, bias=False), nn.Linear(12, 6)
        self.o, self.gate, self.up = nn.Linear(12, 12), nn.Linear(12, 16), nn.Linear(12, 16)
        self.down = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, 3).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        h = x + torch.tanh(self.o(y.transpose(1, 2).reshape(b, t, 12)))
        return self.down(F.silu(self.gate(h)) * self.up(h))


CHAINS = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 5)),
    "1x1 then 3x3": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, stride=2)),
    "1x1 then padded 3x3": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 6, 3, padding=1)),
    "3x3 then 1x1": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Conv2d(8, 6, 1)),
    "groups": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 8, 3, groups=2)),
    "depthwise then depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3, groups=8)),
    "1x1, norm, 3x3": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)),
}


def example(name: str) -> tuple[Tensor]:
    return (torch.randn(3, 8) + 0.5,) if name == "linear" else (images(8, 7, 8),)


# --- fires, same function


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_becomes_one(name: str) -> None:
    optimized = normfuse.optimize(randomized(CHAINS[name]()), example(name))
    assert sum(ops(optimized).values()) == 1
    assert_same(optimized)


def test_projections_of_one_tensor_become_one_when_asked_for() -> None:
    model, args = randomized(Attention()), (torch.randn(2, 5, 12) + 0.5,)
    unasked = normfuse.optimize(model, args)
    assert PASS not in unasked.report.fired
    assert "no faster" in reasons(unasked, PASS)
    asked = run(model, args, PASS)
    assert asked.report.fired == {PASS: 2}
    assert ops(asked)["linear"] == 4 and ops(asked)["split_with_sizes"] == 2
    assert_same(asked, 1e-10)
    with torch.no_grad():
        assert torch.allclose(asked(torch.ones(3, 4, 12)), model(torch.ones(3, 4, 12)), atol=1e-5)


# --- refuses


def test_a_bottleneck_stays_unless_asked_for() -> None:
    model, args = randomized(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))), (torch.randn(3, 8),)
    unasked = normfuse.optimize(model, args)
    assert not unasked.report.fired and "multiplications" in reasons(unasked, PASS)
    assert run(model, args, PASS).report.fired == {PASS: 1}


def test_zeros_around_a_shifted_result_stay() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, padding=1)))
    assert not run(model, (images(8, 6, 6),), PASS).report.fired


def test_a_result_that_is_read_between_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return self.b(y), y

    assert not run(randomized(Read()), (torch.randn(3, 8),), PASS).report.fired


# --- a mutant fails, idempotent


def test_a_mutant_fails() -> None:
    assert_mutant_fails(randomized(CHAINS["linear"]()), example("linear"), PASS)


def test_a_second_run_finds_nothing() -> None:
    args = (torch.randn(2, 5, 12),)
    assert_idempotent(run(randomized(Attention()), args, PASS), args, PASS)
