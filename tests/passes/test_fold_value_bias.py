"""fold_value_bias: the bias of the values goes where the attention's result is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.graph.node import aten, is_op
from normfuse.models import bert, gpt, vit
from normfuse.passes import fold_value_bias

from .checking import assert_idempotent, assert_mutant_fails, assert_same, randomized, reasons, run

NAME = "fold_value_bias"
Probabilities = Callable[[Tensor], Tensor]


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def softmax1(scores: Tensor) -> Tensor:
    weights = scores.exp()
    return weights / (1 + weights.sum(-1, keepdim=True))


def sink(scores: Tensor) -> Tensor:
    return torch.cat([scores, 0.3 * torch.ones_like(scores[..., :1])], -1).softmax(-1)[..., :-1]


def affine(scores: Tensor) -> Tensor:
    return scores.softmax(-1) * 0.8


def shifted(scores: Tensor) -> Tensor:
    return scores.softmax(-1) + 0.1


def linear(scores: Tensor) -> Tensor:
    weights = F.relu(scores)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6)


def over_queries(scores: Tensor) -> Tensor:
    return scores.softmax(-2)


def capped(scores: Tensor) -> Tensor:
    return (torch.tanh(scores / 3) * 3).softmax(-1)


class Attention(nn.Module):
    """Queries in four heads, keys and values in `kv`; what is done to the scores is the caller's."""

    def __init__(self, probabilities: Probabilities = softmax, *, kv: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(24, 24), nn.Linear(24, 24, bias=bias)
        self.k, self.v = nn.Linear(24, 6 * kv), nn.Linear(24, 6 * kv)
        self.probabilities, self.copies = probabilities, 4 // kv

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return [q, *(t.repeat_interleave(self.copies, 1) for t in (k, v))]

    def out(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(self.probabilities(q @ k.transpose(-1, -2) / math.sqrt(6)) @ v)


class Masked(Attention):
    """The fused operator with a mask of one kind or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.zeros(4, 5, 5))
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        self.register_buffer("seen", seen if kind != "empty" else seen & (torch.arange(5) > 0), persistent=False)
        self.register_buffer("saved", (seen | (torch.arange(5) == 1)).clone())

    def mask(self, keep: Tensor) -> Tensor | None:
        least = torch.finfo(torch.float32).min
        if self.kind == "additive":
            return torch.where(keep[:, None, None, :], 0.0, least)
        if self.kind == "twice":
            return torch.where(keep[:, None, None, :], 0.0, least) + torch.where(self.seen, 0.0, least)
        if self.kind == "infinite":
            return torch.where(keep[:, None, None, :], 0.0, -math.inf)
        if self.kind == "boolean":
            return keep[:, None, None, :]
        if self.kind == "learned":
            return self.table + torch.zeros(5, 5).masked_fill(self.seen.logical_not(), -100.0)
        if self.kind == "saved":
            return self.saved
        return self.seen if self.kind == "empty" else self.seen & (torch.arange(5) != 3) | (torch.arange(5) == 1)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.heads(x), self.mask(keep)))


def tokens(*sizes: int) -> Tensor:
    return torch.randn(*sizes or (2, 5, 24)) + 0.7


def keep() -> Tensor:
    return torch.tensor([[True, True, True, True, True], [True, True, False, True, False]])


def value_biases(optimized: normfuse.Optimized) -> list[bool]:
    """Whether each linear has a bias."""
    return [n.args[2] is not None for n in optimized.program.graph.nodes if is_op(n, aten.linear)]


# --- fires


@pytest.mark.parametrize("probabilities", [softmax, capped])
@pytest.mark.parametrize(("kv", "bias"), [(4, True), (2, False), (1, True)])
def test_fires_and_the_value_projection_has_no_bias_left(probabilities: Probabilities, kv: int, bias: bool) -> None:
    optimized = run(randomized(Attention(probabilities, kv=kv, bias=bias)), [tokens()], NAME)
    assert optimized.report.fired == {NAME: 1}
    assert sorted(value_biases(optimized)) == [False, True, True, True]
    assert_same(optimized)


@pytest.mark.parametrize("module", [gpt, vit])
def test_fires_once_for_each_attention(module: Any) -> None:
    args, kwargs = module.example("small")
    optimized = normfuse.optimize(module.build("small"), args, kwargs, passes=[NAME])
    assert optimized.report.fired == {NAME: 2}
    verdict = optimized.report.verification
    assert verdict and verdict.error_float64 < 1e-10 and verdict.error_ratio <= 2


@pytest.mark.parametrize("kind", ["additive", "learned", "fixed"])
def test_masks_that_leave_every_row_something(kind: str) -> None:
    optimized = run(randomized(Masked(kind)), [tokens(), keep()], NAME)
    assert optimized.report.fired == {NAME: 1}, reasons(optimized, NAME)
    assert_same(optimized)


def test_behind_a_padded_convolution_the_border_is_another_number() -> None:
    optimized = run(randomized(ReadByConvolution()), [tokens(2, 5, 24)], NAME)
    assert optimized.report.fired == {NAME: 1}
    assert_same(optimized)


class ReadByConvolution(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Conv1d(24, 24, 3, padding=1)  # type: ignore[assignment]

    def out(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(2, 3).flatten(1, 2))


# --- refuses


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        (softmax1, "div at the model"),
        (sink, "slice at the model"),
        (affine, "mul at the model"),
        (shifted, "add at the model"),
        (linear, "div at the model"),
        (over_queries, "runs over another axis"),
    ],
)
def test_refuses_rows_that_do_not_sum_to_one(probabilities: Probabilities, reason: str) -> None:
    optimized = run(randomized(Attention(probabilities)), [tokens()], NAME)
    assert not optimized.report.fired
    assert reason.replace(" at the model", "") in reasons(optimized, NAME)


@pytest.mark.parametrize("kind", ["boolean", "infinite", "twice", "empty", "saved"])
def test_refuses_masks_that_may_leave_a_row_nothing(kind: str) -> None:
    optimized = run(randomized(Masked(kind)), [tokens(), keep()], NAME)
    assert not optimized.report.fired
    assert "a row of the mask may leave nothing to see" in reasons(optimized, NAME)


def test_refuses_the_padding_mask_of_a_bert() -> None:
    args, kwargs = bert.example("small")
    optimized = normfuse.optimize(bert.build("small"), args, kwargs, passes=[NAME])
    assert not optimized.report.fired
    assert "a row of the mask may leave nothing to see" in reasons(optimized, NAME)


class Variant(Attention):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        if what == "transposed":
            self.o = nn.ConvTranspose1d(24, 24, 3)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.heads(x)
        p = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.1, training=self.what == "dropout")
        v = v * 1.5 if self.what == "scaled" else v
        y = F.dropout(p @ v, 0.1, training=self.what == "dropout behind")
        if self.what == "tapped":
            return self.out(y), v.tanh()
        return self.o(y.transpose(2, 3).flatten(1, 2)) if self.what == "transposed" else self.out(y)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("dropout", "dropout"),
        ("dropout behind", "is on"),
        ("scaled", "scales the values: run fold_scalars before"),
        ("tapped", "the values are also read by tanh"),
        ("transposed", "a shift does not pass the transposed convolution"),
    ],
)
def test_refuses(what: str, reason: str) -> None:
    optimized = run(randomized(Variant(what)), [tokens()], NAME, verify="dropout" not in what)
    assert not optimized.report.fired
    assert reason in reasons(optimized, NAME)


def test_by_default_nothing_moves() -> None:
    assert NAME not in normfuse.optimize(randomized(Attention()), (tokens(),)).report.fired


# --- same function: in `fires`; a mutant fails


def test_mutant_fails() -> None:
    assert_mutant_fails(randomized(Attention()), [tokens()], NAME)


@pytest.mark.parametrize("probabilities", [softmax1, sink, affine, linear])
def test_moved_nevertheless_it_is_rolled_back(monkeypatch: pytest.MonkeyPatch, probabilities: Probabilities) -> None:
    monkeypatch.setattr(fold_value_bias, "why_not_one", lambda program, mix: None)
    optimized = run(randomized(Attention(probabilities)), [tokens()], NAME)
    assert not optimized.report.fired
    assert "rolled back, the float64 error" in reasons(optimized, NAME)


# --- idempotent


def test_idempotent() -> None:
    assert_idempotent(run(randomized(Attention()), [tokens()], NAME), [tokens()], NAME)
