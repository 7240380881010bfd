"""Verification must reject what is wrong, by however little, and name the rewrite that did it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import normfuse
from normfuse.analysis import Facts
from normfuse.capture.export import capture
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.node import aten, is_op
from normfuse.graph.program import Program
from normfuse.passes import TABLE
from normfuse.pipeline.run import Pipeline
from normfuse.rewrite import Editor, Exactness, Transform
from normfuse.verification.trials import make_trials, original_run
from tests.support import assert_same_function, image, randomised


class Model(nn.Module):
    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * self.by


X = image(3, 6)


def test_a_model_is_itself() -> None:
    model = randomised(Model())
    verdict = normfuse.verify(model, model, (X,))
    assert verdict
    assert verdict.error_float64 == 0
    assert verdict.error_ratio <= 1
    assert verdict.max_abs_error == 0


@pytest.mark.parametrize("by", [1 + 1e-6, 2.0, 0.0, -1.0, math.nan])
def test_a_scaled_output_is_another_function(by: float) -> None:
    model = randomised(Model())
    assert not normfuse.verify(model, Scaled(model, by).eval(), (X,))


def test_integers_must_be_identical() -> None:
    class Best(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argsort(-1)

    class Other(Best):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).flip(-1)

    one = randomised(Best())
    other = Other()
    other.load_state_dict(one.state_dict())
    assert normfuse.verify(one, one, (X,))
    assert not normfuse.verify(one, other.eval(), (X,))


def test_nan_and_infinity_must_stand_in_the_same_places() -> None:
    class Holes(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(x[:, :4] > 0.7, -math.inf)

    class Elsewhere(Holes):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Model.forward(self, x).masked_fill(x[:, :4] < 0.7, -math.inf)

    one = randomised(Holes())
    other = Elsewhere()
    other.load_state_dict(one.state_dict())
    assert normfuse.verify(one, one, (X,))
    assert not normfuse.verify(one, other.eval(), (X,))
    assert_same_function(normfuse.optimize(one, (X,)))


def test_casts_to_float32_inside_the_model_are_promoted_too() -> None:
    class Upcast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32).pow(2).mean(-1).to(x.dtype)

    program = capture(Upcast().eval(), (X.bfloat16(),))
    (out,) = run_float64(program, [[X.bfloat16()]])[0]
    assert out.dtype == torch.float64
    assert torch.equal(out, X.bfloat16().double().pow(2).mean(-1))


# -- roll-back -----------------------------------------------------------------------------------------------------


def broken(count: int) -> Transform:
    """A pass that shifts every linear's bias; with `count` right firings before the wrong one."""

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        for place, node in enumerate([n for n in program.graph.nodes if is_op(n, aten.linear)]):
            if not edit.permit(node):
                continue
            edit.fired(node, before="linear", after="linear, off by a little")
            with edit.at(node):
                bias = edit.value(node.args[2])
                edit.replace(node, edit.rebuild(node, bias=bias * (1 + 1e-6) if place == count else bias * 1.0))

    return Transform("broken", exactness=Exactness.ALGEBRAIC, run=run)


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_wrong_firing_is_found_and_the_others_are_kept(wrong: int) -> None:
    model = randomised(Model())
    captured = capture(model, (X,))
    trials = make_trials(captured, original_run(model, captured), [X], 3)
    result = Pipeline(captured, (*TABLE, broken(wrong)), named=False).run(trials)
    (refusal,) = result.rolled_back
    assert refusal.pass_name == "broken"
    assert ("first", "last")[wrong] in refusal.site
    assert "rolled back, the float64 error" in refusal.reason
    assert result.log.counts()["broken"] == 1
    assert result.log.counts()["layer_norm_to_rms_norm"] == 1
    assert result.verification


@pytest.mark.parametrize("outputs", [1, 4, 100])
def test_a_rewrite_that_loses_digits_is_rolled_back(outputs: int) -> None:
    """Equal in float64, four digits worse in float32; with few outputs on as many more inputs as it takes."""

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        node = next(n for n in program.graph.nodes if is_op(n, aten.layer_norm))
        if edit.permit(node):
            edit.fired(node, before="x", after="(x + 4096) - 4096")
            edit.insert_behind(node, lambda value: (value + 4096.0) - 4096.0)

    model = randomised(Model(outputs))
    captured = capture(model, (X,))
    trials = make_trials(captured, original_run(model, captured), [X], 3)
    rule = Transform("there_and_back", exactness=Exactness.ALGEBRAIC, run=run)
    result = Pipeline(captured, (rule,), named=False).run(trials)
    assert [r.pass_name for r in result.rolled_back] == ["there_and_back"]
    assert "times the original's" in result.rolled_back[0].reason
    assert result.verification
    assert outputs * sum(len(leaves[0]) for leaves in trials.inputs) >= 128 or len(trials.inputs) == 64


def test_a_pass_whose_result_does_not_even_run_is_rolled_back() -> None:
    def run(program: Program, facts: Facts, edit: Editor) -> None:
        node = next(n for n in program.graph.nodes if is_op(n, aten.linear))
        if edit.permit(node):
            edit.fired(node, before="linear", after="nonsense")
            new: fx.Node = program.graph.node_copy(node, lambda n: n)
            node.append(new)
            new.args = (node.args[0], node.args[2], None)
            node.replace_all_uses_with(new)

    model = randomised(Model())
    captured = capture(model, (X,))
    trials = make_trials(captured, original_run(model, captured), [X], 2)
    rule = Transform("nonsense", exactness=Exactness.ALGEBRAIC, run=run)
    result = Pipeline(captured, (rule,), named=False).run(trials)
    assert [r.pass_name for r in result.rolled_back] == ["nonsense"]
    assert result.verification


def test_state_of_the_model_that_capture_froze_is_noticed() -> None:
    class Drifts(Model):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    with pytest.raises(normfuse.VerificationError, match="does not compute what the model does"):
        normfuse.optimize(randomised(Drifts()), (X,))


# -- results that were saved ---------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = randomised(Model())
    result = normfuse.optimize(model, (X,))
    result.save(tmp_path / "m.pt2")
    loaded = normfuse.load(tmp_path / "m.pt2")
    assert normfuse.verify(model, loaded, (X,))
    assert loaded.report.fired == result.report.fired
    assert loaded(x=image(5, 6)).shape == (5, 4)
    again = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(again(x=X), model(X))


def test_the_inventory_of_a_result() -> None:
    result = normfuse.optimize(randomised(Model()), (X,))
    inventory = normfuse.inspect(result, (X,))
    assert (inventory.count("rms_norm"), inventory.count("layer_norm")) == (1, 0)


def test_reports_as_text_json_and_html(tmp_path: Path) -> None:
    report = normfuse.optimize(randomised(Model()), (X,)).report
    assert "layer_norm_to_rms_norm" in str(report)
    assert "equivalent" in str(report)
    report.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["fired"] == report.fired
    assert data["verification"]["equivalent"] is True
    assert {"capture", "bake", "verify", "lower", "total"} <= set(data["seconds"])
    report.save(tmp_path / "r.html")
    assert "layer_norm_to_rms_norm" in (tmp_path / "r.html").read_text()


def test_weights_of_another_checkpoint() -> None:
    one, other = randomised(Model(), seed=1), randomised(Model(), seed=2)
    first, second = normfuse.optimize(one, (X,)), normfuse.optimize(other, (X,))
    replayed = normfuse.replay(first.report.weights, other.state_dict())
    assert replayed.keys() == second.report.weights.keys()
    assert all(torch.equal(replayed[name], second.tensors()[name]) for name in replayed)


def test_replay_says_what_is_missing() -> None:
    ledger = normfuse.optimize(randomised(Model()), (X,)).report.weights
    with pytest.raises(normfuse.NormfuseError, match="the checkpoint has no 'first"):
        normfuse.replay(ledger, {})


def test_the_program_is_left_alone_by_its_copies() -> None:
    captured = capture(randomised(Model()), (X,))
    before = str(captured.graph)
    Pipeline(captured, TABLE, named=False).run(None)
    assert str(captured.graph) == before
    assert dataclasses.is_dataclass(captured)
