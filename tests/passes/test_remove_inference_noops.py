"""remove_inference_noops: what does nothing at inference goes, what does something stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normfuse
from normfuse.passes import remove_inference_noops
from tests.support import assert_idempotent, assert_rolled_back, image, operators, optimized, reasons

NAME = "remove_inference_noops"


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.3), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.linear(x)) * 1 + 0
        return F.dropout(y.expand(-1, -1).reshape(*y.shape), training=False)[:]


class Busy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).expand(3, *x.shape)[1:, :, 1:]


class Active(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=True).sin()


# -- fires ---------------------------------------------------------------------------------------------------------


def test_only_the_linear_stays() -> None:
    result = optimized(Idle().eval(), image(3, 6), passes=[NAME])
    assert operators(result) == ["linear"]


# -- refuses -------------------------------------------------------------------------------------------------------


def test_what_does_something_stays() -> None:
    result = optimized(Busy().eval(), image(3, 6), passes=[NAME])
    assert {"mul", "add", "expand"} <= set(operators(result))


def test_active_dropout_is_refused() -> None:
    result = normfuse.optimize(Active().eval(), (image(3, 6),), passes=[NAME], verify=False)
    assert "dropout" in operators(result)
    assert reasons(result, NAME) == ["dropout is active at inference: it was called with training=True"]


def test_integers_and_true_division_keep_their_dtype() -> None:
    class Promotes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 1

    result = optimized(Promotes().eval(), torch.arange(6), passes=[NAME])
    assert result(torch.arange(6)).dtype == torch.float32


# -- a mutant fails ------------------------------------------------------------------------------------------------


def test_a_pass_that_drops_too_much_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remove_inference_noops, "_is_number", lambda item, number: True)
    assert_rolled_back(Busy().eval(), image(3, 6), pass_name=NAME)


# -- idempotent ----------------------------------------------------------------------------------------------------


def test_idempotent() -> None:
    result = optimized(Idle().eval(), image(3, 6), passes=[NAME])
    assert_idempotent(result, image(3, 6), pass_name=NAME)
