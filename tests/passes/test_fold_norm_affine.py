"""fold_norm_affine: gains and shifts of norms move into every projection behind them, or stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import models
from normfuse.algebra import push
from normfuse.analysis.reach import End
from normfuse.rewrite import Editor, Value
from tests.support import (
    assert_idempotent,
    assert_rolled_back,
    assert_same_function,
    ids,
    image,
    optimized,
    randomised,
    reasons,
)

NAME = "fold_norm_affine"
WIDTH = 12


class Readers(nn.Module):
    """One norm, several readers: with and without bias, through a view, transposed weight."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False)
        self.c = nn.Parameter(torch.zeros(WIDTH, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        flat = torch.addmm(self.a.bias, n.view(-1, WIDTH), self.c).view(*x.shape[:-1], 8)
        return self.a(n) + self.b(n).sin() + flat.cos() + n @ self.c


def affine_norms(result: normfuse.Optimized) -> int:
    count = 0
    for node in result.graph_module.graph.nodes:
        if getattr(node.target, "_opname", "") in ("layer_norm", "rms_norm"):
            count += any(a is not None for a in node.args[2:4] if isinstance(a, torch.fx.Node))
    return count


# -- fires ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)])
def test_into_every_reader(norm: nn.Module) -> None:
    result = optimized(randomised(Readers(norm)), image(2, 5, WIDTH), passes=[NAME])
    assert result.report.fired == {NAME: 1}
    assert affine_norms(result) == 0


def test_into_a_convolution_behind_a_permute() -> None:
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv2d(WIDTH, 8, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    assert optimized(randomised(Down()), image(2, WIDTH, 6, 6), passes=[NAME]).report.fired == {NAME: 1}


def test_gains_written_one_plus_w() -> None:
    family = models.load("llama")
    args, kwargs = family.example("small-gemma")
    result = normfuse.optimize(family.build("small-gemma"), args, kwargs)
    assert_same_function(result)
    assert result.report.fired[NAME] >= 4


def test_a_shared_head_only_when_asked_for_by_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.norm(self.embed(x).sin()), self.embed.weight)

    model = randomised(Tied())
    result = optimized(model, ids(2, 7))
    assert NAME not in result.report.fired
    assert "shared with another call site" in reasons(result, NAME)[0]
    by_name = optimized(model, ids(2, 7), passes=[NAME])
    assert by_name.report.fired == {NAME: 1}
    extra = sum(t.numel() for t in by_name.tensors().values()) - sum(p.numel() for p in model.parameters())
    assert extra == 50 * WIDTH + 50 - 2 * WIDTH  # the untied head and its new bias, less the gain and the shift


# -- refuses -------------------------------------------------------------------------------------------------------


class Residual(Readers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return n + self.a(n).sum(-1, keepdim=True)


class Output(Readers):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        n = self.norm(x)
        return n, self.a(n)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x).transpose(1, 2))


class Adaptive(Readers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = nn.functional.layer_norm(x, (WIDTH,), x.mean((0, 1)), None)
        return self.a(n)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual(), "the norm is also read by add"),
        (Output(), "the norm is also an output of the model"),
        (Padded(), "the shift does not pass the zero padding"),
        (Adaptive(), "the gain depends on the input"),
    ],
    ids=["residual", "output", "padded", "adaptive"],
)
def test_refuses(model: nn.Module, reason: str) -> None:
    result = optimized(randomised(model), image(2, 5, WIDTH), passes=[NAME])
    assert result.report.fired == {}
    assert any(reason in r for r in reasons(result, NAME)), reasons(result, NAME)


def test_a_gain_alone_passes_zero_padding() -> None:
    model = Padded()
    model.norm = nn.LayerNorm(WIDTH, bias=False)
    assert optimized(randomised(model), image(2, 5, WIDTH), passes=[NAME]).report.fired == {NAME: 1}


# -- same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_same_function_in_every_dtype(dtype: torch.dtype) -> None:
    assert optimized(randomised(Readers()).to(dtype), image(2, 5, WIDTH).to(dtype), passes=[NAME]).report.fired


# -- a mutant fails ------------------------------------------------------------------------------------------------


class Square(nn.Module):
    """As many outputs as inputs: a gain along the wrong axis has the right shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x.sin())
        return self.a(n) * self.b(n)


def test_a_gain_on_the_wrong_axis_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(value: Value, axis: int, ndim: int) -> Value:
        return value.reshape(*[-1 if i == 0 else 1 for i in range(ndim)])

    monkeypatch.setattr(Value, "along", wrong)
    assert_rolled_back(randomised(Square()), image(2, 5, WIDTH), pass_name=NAME)


def test_a_skipped_reader_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    true = push.taken

    def skip_b(edit: Editor, end: End, *rest: Any) -> Value:
        if "b_weight" in str(end.projection.weight):
            return edit.rebuild(end.node)
        return true(edit, end, *rest)

    monkeypatch.setattr(push, "taken", skip_b)
    assert_rolled_back(randomised(Square()), image(2, 5, WIDTH), pass_name=NAME)


# -- idempotent ----------------------------------------------------------------------------------------------------


def test_idempotent() -> None:
    result = optimized(randomised(Readers()), image(2, 5, WIDTH), passes=[NAME])
    assert_idempotent(result, image(2, 5, WIDTH), pass_name=NAME)
