"""rms_norm_to_crms_norm: a stream of zero mean with one channel less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.graph.node import aten, is_op, shape
from normfuse.models import gpt, llama, neox, vit
from normfuse.ops.crms_norm import CRMS_NORM
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.passes import rms_norm_to_crms_norm, rotate_residual
from normfuse.rewrite import Rule

BEFORE = ["layer_norm_to_rms_norm", "fold_norm_affine"]
FORMS = ["drop_last", "householder"]


def compressed(module: Any, *rules: str | Rule, config: Any = "small") -> normfuse.Optimized:
    args, kwargs = module.example(config)
    return normfuse.optimize(module.build(config), args, kwargs, passes=[*BEFORE, *rules])


def reasons(optimized: normfuse.Optimized) -> str:
    return "\n".join(r.reason for r in optimized.report.refusals)


def form(name: str) -> Rule:
    return rms_norm_to_crms_norm.configured(form=name)


# --- fires


@pytest.mark.parametrize("module", [gpt, vit, neox])
@pytest.mark.parametrize("name", FORMS)
def test_every_tensor_of_the_stream_is_narrower(module: Any, name: str) -> None:
    result = compressed(module, form(name))
    # Neox reads one tensor by two norms, which are one without their gains.
    assert result.report.fired["rms_norm_to_crms_norm"] == (3 if module is neox else 5)
    norms = [n for n in result.program.graph.nodes if is_op(n, RMS_NORM, CRMS_NORM)]
    assert {int(shape(n)[-1]) for n in norms} == {63}
    assert all(is_op(n, CRMS_NORM) == (name == "drop_last") for n in norms)
    adds = [n for n in result.program.graph.nodes if is_op(n, aten.add) and int(shape(n)[-1]) in (63, 64)]
    assert adds and all(int(shape(n)[-1]) == 63 for n in adds)


def test_the_inventory_knows_it() -> None:
    assert normfuse.inspect(compressed(gpt, "rms_norm_to_crms_norm"), *gpt.example("small")).count("crms_norm") == 5


def test_only_when_asked_for() -> None:
    args, kwargs = gpt.example("small")
    assert "rms_norm_to_crms_norm" not in normfuse.optimize(gpt.build("small"), args, kwargs).report.fired


class Reshaping(nn.Module):
    """Code that writes the width of the stream as a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(19, 16)
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)
        self.final, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = (x + self.mix(self.norm(x))).reshape(-1, 16)
        return self.head(self.final(x.view(ids.shape[0], -1, 16)))


def reshaping() -> tuple[nn.Module, tuple[torch.Tensor]]:
    from normfuse.models._random import randomized

    return randomized(Reshaping, 1), (torch.randint(0, 19, (2, 6)),)


@pytest.mark.parametrize("name", FORMS)
def test_literal_sizes_on_the_stream_change_with_it(name: str) -> None:
    model, args = reshaping()
    report = normfuse.optimize(model, args, passes=[*BEFORE, form(name)]).report
    assert report.fired["rms_norm_to_crms_norm"] == 2 and report.verification


# --- refuses


def test_refuses_a_stream_with_a_mean() -> None:
    result = compressed(llama, "rms_norm_to_crms_norm")
    assert "rms_norm_to_crms_norm" not in result.report.fired
    assert "the stream has a mean" in reasons(result)


def test_refuses_gains() -> None:
    args, kwargs = gpt.example("small")
    passes = ["layer_norm_to_rms_norm", "rms_norm_to_crms_norm"]
    result = normfuse.optimize(gpt.build("small"), args, kwargs, passes=passes)
    assert "has a gain or other axes: run fold_norm_affine before" in reasons(result)


def test_worth_says_so_with_numbers() -> None:
    text = normfuse.explain(gpt.build("small-untied"), "rms_norm_to_crms_norm", *gpt.example("small-untied"))
    assert "it saves 1 of 64 channels (1.56 %), and rows of 63 channels are 252 bytes, no multiple of 16" in text


def test_unknown_forms_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="form must be one of drop_last, householder"):
        rms_norm_to_crms_norm.configured(form="fold")


def test_in_place_it_is_refused() -> None:
    model, args = reshaping()
    report = normfuse.optimize_(model, args, passes=[*BEFORE, "rms_norm_to_crms_norm"])
    assert report.fired == {"layer_norm_to_rms_norm": 2, "fold_norm_affine": 2}
    assert any("gets another shape, which the code may rely on" in r.reason for r in report.refusals)


# --- same function


@pytest.mark.parametrize("module", [gpt, vit, neox])
@pytest.mark.parametrize("name", FORMS)
def test_same_function(module: Any, name: str) -> None:
    verdict = compressed(module, form(name)).report.verification
    assert verdict and verdict.error_float64 < 1e-10 and verdict.error_ratio <= 2


def test_the_householder_form_turns_and_the_other_does_not() -> None:
    turn = rotate_residual.configured(kind="random", seed=5, heads=False)
    both = compressed(vit, form("householder"), turn)
    assert both.report.fired["rotate_residual"] == 1 and both.report.verification
    other = compressed(vit, form("drop_last"), turn)
    assert "rotate_residual" not in other.report.fired
    assert "needs its own basis: use the householder form" in reasons(other)


def test_a_rotated_crms_norm_is_another_function() -> None:
    """The negative control: what `rotate_residual` refuses would be wrong."""
    from normfuse.algebra.orthogonal import random_orthogonal

    z, q = torch.randn(40, 63, dtype=torch.float64) + 0.3, random_orthogonal(63, 2)
    for op, least in ((CRMS_NORM, 1e-2), (RMS_NORM, 0.0)):
        turned, plain = op(z @ q, [-1], eps=1e-5), op(z, [-1], eps=1e-5) @ q
        error = float((turned - plain).norm() / plain.norm())
        assert error > least if least else error < 1e-14


def test_the_formula() -> None:
    z = torch.randn(7, 9, dtype=torch.float64) * 3
    x = torch.cat([z, -z.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(CRMS_NORM(z, [-1], eps=1e-3), nn.functional.rms_norm(x, (10,), eps=1e-3)[:, :-1])


# --- a mutant fails


def test_the_wrong_divisor_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.rewrite import Editor

    right = Editor.op

    def wrong(self: Editor, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "crms_norm":
            kwargs["eps"] *= 1.01
        return right(self, name, *args, **kwargs)

    monkeypatch.setattr(Editor, "op", wrong)
    result = compressed(vit, "rms_norm_to_crms_norm")
    assert "rms_norm_to_crms_norm" not in result.report.fired
    assert "rolled back, the float64 error" in reasons(result)


# --- idempotent


def test_once_is_enough() -> None:
    first = compressed(vit, "rms_norm_to_crms_norm")
    again = normfuse.optimize(first, *vit.example("small"), passes=["rms_norm_to_crms_norm"])
    assert again.report.fired == {}
