"""fold_batch_norm: frozen BatchNorm moves into the projection before it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import models
from normfuse.passes import fold_batch_norm
from normfuse.rewrite import Editor, Value
from tests.support import (
    assert_idempotent,
    assert_rolled_back,
    assert_same_function,
    image,
    operators,
    optimized,
    randomised,
    reasons,
)

NAME = "fold_batch_norm"
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pair(conv: nn.Module, norm: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(conv, norm))


def folded(model: nn.Module, x: torch.Tensor) -> normfuse.Optimized:
    result = optimized(model, x, passes=[NAME])
    assert result.report.fired == {NAME: 1}
    assert "batch_norm" not in operators(result)
    assert result.report.verification and result.report.verification.error_float64 <= 1e-12
    return result


# -- fires ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "groups", "bias"), list(itertools.product((1, 2, 3), (1, 2, 8), (True, False))), ids=str
)
def test_convolutions(dims: int, groups: int, bias: bool) -> None:
    conv = CONVOLUTIONS[dims](8, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    folded(pair(conv, NORMS[dims](8)), image(2, 8, *[6] * dims))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_and_dilation(mode: str, dilation: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=2, dilation=dilation, padding_mode=mode)
    folded(pair(conv, nn.BatchNorm2d(6)), image(2, 4, 7, 7))


@pytest.mark.parametrize(("dims", "groups"), list(itertools.product((1, 2, 3), (1, 2, 8))), ids=str)
def test_transposed_convolutions(dims: int, groups: int) -> None:
    """In and out channels alike, so that a scale along the wrong axis would have the right shape."""
    conv = TRANSPOSED[dims](8, 8, 3, stride=2, output_padding=1, groups=groups)
    result = folded(pair(conv, NORMS[dims](8)), image(2, 8, *[4] * dims))
    assert any(t.shape == conv.weight.shape for t in result.tensors().values())


def test_transposed_convolution_with_fewer_outputs() -> None:
    result = folded(pair(nn.ConvTranspose2d(8, 4, 3, groups=2), nn.BatchNorm2d(4)), image(2, 8, 4, 4))
    assert any(t.shape == (8, 2, 3, 3) for t in result.tensors().values())


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    folded(pair(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7)), image(4, 5))


def test_linear_on_sequences_with_the_norm_over_channels() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)

    folded(randomised(Tokens()), image(3, 6, 5))


def test_without_gains_and_with_other_eps() -> None:
    folded(pair(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, eps=0.3, affine=False)), image(2, 3, 4, 4))


def test_a_module_called_twice_is_folded_at_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norms[1](self.conv(self.norms[0](self.conv(x)).relu()))

    result = optimized(randomised(Twice()), image(2, 4, 5, 5), passes=[NAME])
    assert result.report.fired == {NAME: 2}


@pytest.mark.parametrize(("name", "norms"), [("resnet", None), ("mobilenet", None)])
def test_specimens_keep_no_batch_norm(name: str, norms: int | None) -> None:
    family = models.load(name)
    args, kwargs = family.example("small")
    result = normfuse.optimize(family.build("small"), args, kwargs)
    assert_same_function(result)
    assert "batch_norm" not in operators(result)


# -- refuses -------------------------------------------------------------------------------------------------------


class Tap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.a(y) + y


class TwoNorms(Tap):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.a(y) * self.b(y)


class Returned(Tap):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.a(y), y


class Activated(Tap):
    def forward(self, x: torch.Tensor) -> Any:
        return self.a(self.conv(x).relu())


class NoStatistics(Tap):
    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.batch_norm(self.conv(x), None, None, self.a.weight, self.a.bias, training=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Tap(), "is also read elsewhere"),
        (TwoNorms(), "is also read elsewhere"),
        (Returned(), "is also read elsewhere"),
        (Activated(), "which has no weights to fold into"),
        (NoStatistics(), "it normalises by batch statistics"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "",
)
def test_refuses(model: nn.Module, reason: str) -> None:
    result = optimized(randomised(model), image(2, 4, 5, 5), passes=[NAME])
    assert result.report.fired == {}
    assert reasons(result, NAME) and all(reason in r for r in reasons(result, NAME)), reasons(result, NAME)


def test_linear_whose_norm_is_over_tokens() -> None:
    """BatchNorm1d on (batch, tokens, channels) normalises tokens: not the linear's outputs."""
    result = optimized(pair(nn.Linear(5, 7), nn.BatchNorm1d(6)), image(3, 6, 5), passes=[NAME])
    assert result.report.fired == {}


# -- same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_same_function_in_every_dtype(dtype: torch.dtype) -> None:
    folded(pair(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)).to(dtype), image(2, 4, 7, 7).to(dtype))


# -- a mutant fails ------------------------------------------------------------------------------------------------


def test_a_wrong_eps_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    true = fold_batch_norm._scale_and_shift

    def wrong(node: torch.fx.Node, edit: Editor) -> tuple[Value, Value]:
        scale, shift = true(node, edit)
        return scale * (1 + 1e-6), shift

    monkeypatch.setattr(fold_batch_norm, "_scale_and_shift", wrong)
    assert_rolled_back(pair(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), image(2, 4, 7, 7), pass_name=NAME)


# -- idempotent ----------------------------------------------------------------------------------------------------


def test_idempotent() -> None:
    x = image(2, 4, 7, 7)
    result = folded(pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), x)
    assert_idempotent(result, x, pass_name=NAME)
