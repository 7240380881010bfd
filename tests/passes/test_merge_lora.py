"""merge_lora: linear, convolution and embedding adapters, rsLoRA, several at once, bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

PASS = "merge_lora"
RANK = 3


class Linear(nn.Module):
    def __init__(self, scale: float = 16 / RANK, *, bent: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(12, 10)
        self.a, self.b = nn.Linear(12, RANK, bias=False), nn.Linear(RANK, 10, bias=False)
        self.dropout, self.scale, self.bent = nn.Dropout(0.1), scale, bent

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.a(self.dropout(x))
        return self.base(x) + self.b(F.relu(narrow) if self.bent else narrow) * self.scale


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.a, self.b = nn.Conv2d(4, 2, 3, stride=2, padding=1, bias=False), nn.Conv2d(2, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.5 * self.b(self.a(x))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Embedding(20, 12)
        self.a, self.b = nn.Parameter(torch.ones(RANK, 20)), nn.Parameter(torch.ones(12, RANK))

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + (F.embedding(ids, self.a.T) @ self.b.T) * 0.7


class Transposed(nn.Module):
    """GPT-2's layout: addmm with (in, out) weights, two adapters on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(12, 10)), nn.Parameter(torch.ones(10))
        self.first, self.second = Linear(0.5), Linear(1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.weight)
        for adapter in (self.first, self.second):
            y = y + adapter.scale * adapter.b(adapter.a(x))
        return y


class Flattening(Linear):
    """The same over tokens: GPT-2's own layer flattens them and takes the result apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(12, 10)), nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], 10) + self.b(self.a(x)) * self.scale


class Pooled(nn.Module):
    """QA-LoRA: the adapter reads means of groups of channels, times their size."""

    def __init__(self, gather: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.base, self.gather = nn.Linear(12, 10), gather
        self.a, self.b = nn.Linear(width, 2, bias=False), nn.Linear(2, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.gather(x) * 3.0)) * 0.7


class Bone(nn.Module):
    """The adapter is one matrix behind a sum over every third channel."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.bone = nn.Linear(12, 10), nn.Parameter(torch.ones(3, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.reshape(*x.shape[:-1], 4, 3).sum(-2) @ self.bone


def tokens() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 12) + 0.4,)


CASES = {
    "gpt-2": (Flattening, tokens, "linear"),
    "qa-lora": (lambda: Pooled(lambda x: F.avg_pool1d(x, 3), 4), tokens, "linear"),
    "group means": (lambda: Pooled(lambda x: x.unflatten(-1, (4, 3)).mean(-1), 4), tokens, "linear"),
    "group sums": (lambda: Pooled(lambda x: x.view(2, 5, 4, 3).sum(-1), 4), tokens, "linear"),
    "bone": (Bone, tokens, "linear"),
    "linear": (Linear, lambda: (torch.randn(2, 5, 12) + 0.4,), "linear"),
    "rslora": (lambda: Linear(16 / RANK**0.5), lambda: (torch.randn(2, 5, 12) + 0.4,), "linear"),
    "conv": (Conv, lambda: (images(4, 9, 9),), "conv2d"),
    "embedding": (Embedding, lambda: (torch.randint(20, (2, 7)),), "embedding"),
    "two adapters": (Transposed, lambda: (torch.randn(5, 12) + 0.4,), "linear"),
}


# --- fires, same function


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_goes_into_its_base(name: str) -> None:
    make, example, op = CASES[name]
    optimized = run(randomized(make()), example(), PASS)
    assert optimized.report.fired == {PASS: 1}
    assert ops(optimized)[op] == 1 and not set(ops(optimized)) & {"add", "mul", "addmm", "matmul"}
    assert_same(optimized, 1e-13)


def test_a_bf16_weight_is_rounded_once() -> None:
    """At most one unit in the last place off the exact sum, per element."""
    model = randomized(Linear()).to(torch.bfloat16)
    optimized = run(model, [torch.randn(2, 5, 12).to(torch.bfloat16) + 0.4], PASS)
    assert_same(optimized, 1e-13)
    [merged] = [p for p in optimized.graph_module.parameters() if p.dim() == 2]
    w, a, b = (p.detach().double() for p in (model.base.weight, model.a.weight, model.b.weight))
    exact = w + model.scale * b @ a
    unit = torch.finfo(torch.bfloat16).eps * 2 ** exact.abs().log2().floor()
    assert ((merged.double() - exact).abs() <= unit / 2).all()


def test_the_whole_table_keeps_its_order() -> None:
    """The adapter merges before a norm behind it folds."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora, self.norm = Conv(), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lora(x))

    import normfuse

    optimized = normfuse.optimize(randomized(Normed()), (images(4, 9, 9),))
    assert ops(optimized) == {"conv2d": 1}
    assert_same(optimized)


# --- refuses


def test_a_bent_adapter_stays() -> None:
    optimized = run(randomized(Linear(bent=True)), [torch.randn(2, 12)], PASS)
    assert not optimized.report.fired


def test_an_adapter_of_another_tensor_stays() -> None:
    class Apart(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(torch.tanh(x)))

    optimized = run(randomized(Apart()), [torch.randn(2, 12)], PASS)
    assert not optimized.report.fired
    assert "read different tensors" in reasons(optimized, PASS)


def test_a_scale_that_depends_on_the_input_stays() -> None:
    class Gated(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x)) * x.mean()

    assert not run(randomized(Gated()), [torch.randn(2, 12)], PASS).report.fired


@pytest.mark.parametrize(
    "gather",
    [lambda x: F.avg_pool1d(x, 3, stride=1)[..., :4], lambda x: x.unflatten(-1, (4, 3)).amax(-1), lambda x: x[..., :4]],
)
def test_other_sums_of_channels_stay(gather: Callable[[Tensor], Tensor]) -> None:
    optimized = run(randomized(Pooled(gather, 4)), tokens(), PASS, verify=False)
    assert not optimized.report.fired


def test_a_pool_over_positions_is_no_sum_of_channels() -> None:
    """avg_pool1d over (N, C, L) before a convolution pools positions."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = (nn.Conv1d(i, o, 1, bias=False) for i, o in ((6, 6), (6, 2), (2, 6)))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(F.avg_pool1d(x, 3)) + self.b(self.a(F.avg_pool1d(x, 3)))

    assert_same(run(randomized(Positions()), [torch.randn(2, 6, 9) + 0.4], PASS))


# --- a mutant fails, idempotent


def test_a_mutant_fails() -> None:
    assert_mutant_fails(randomized(Linear()), [torch.randn(2, 12)], PASS)


def test_a_second_run_finds_nothing() -> None:
    args = [torch.randn(2, 12)]
    assert_idempotent(run(randomized(Linear()), args, PASS), args, PASS)
