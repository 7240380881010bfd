"""Lowering rules as passes are: each fires on a specimen, each that is wrong by 1e-6 is found, rolled back and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import normfuse
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx.file import write
from normfuse.lower.onnx.form import onnx_target
from normfuse.lower.onnx.rules import TABLE
from normfuse.lower.target import Target
from normfuse.models import gpt
from normfuse.pipeline.lowering import lower
from normfuse.pipeline.run import Pipeline
from normfuse.pipeline.subject import capture_and_try
from normfuse.verification.trials import Trials

from ..mutants import mutant
from . import specimens

FIRES_ON = {
    "zero_pad": "image", "pad_before_pool": "image", "turned_back": "words", "fourier": "rows", "part": "rows",
    "adaptive_pool": "image", "lower_experts": "experts", "unflatten_products": "words", "recognise_masks": "words",
    "lower_attention": "words", "drop_attention_biases": "words", "spell_attention": "words", "split_grouped": "image",
    "spread_gates": "image", "lower_linear": "rows", "gather_rows": "rows", "lower_norm": "image", "decompose": "rows",
    "gather": "rows", "reshape": "rows", "residual": "words", "bias_gelu": "words", "gate_before_norm": "words",
    "own_outputs": "words",
}  # fmt: skip
EACH_RULE = pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.name) for rule in TABLE])


@pytest.fixture(autouse=True)
def _all_choices_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule that asks the table of measurements is told to do what it is for."""

    def other(self: Choice, edit: Any, question: str, usual: str, answer: str, *, size: Any) -> str:
        return usual if question == "sum before a norm" else answer

    monkeypatch.setattr(Choice, "decide", other)


@pytest.fixture(scope="module")
def captured() -> dict[str, tuple[Program, Trials]]:
    found: dict[str, tuple[Program, Trials]] = {}
    for name in specimens.MODELS:
        model, args = specimens.build(name)
        shapes = {"x": {0: torch.export.Dim.DYNAMIC}} if name == "image" else "auto"
        program, trials, _ = capture_and_try(model, args, None, shapes, 2)
        assert trials is not None
        found[name] = Pipeline(program, (), named=False).raise_()[0], trials
    return found


def target(*rules: Any) -> Target:
    return Target("ONNX", rules, choice=Choice("onnxruntime", write.OPSET))


def test_every_rule_has_a_specimen_and_a_name_of_its_own() -> None:
    assert list(FIRES_ON) == [rule.name for rule in TABLE]


@pytest.mark.parametrize("name", specimens.MODELS)
def test_the_form_computes_the_same_in_float64(name: str, captured: dict[str, tuple[Program, Trials]]) -> None:
    program, trials = captured[name]
    lowered = lower(program, target(*TABLE), trials)
    assert lowered.error64 is not None and lowered.error64 < 1e-13 and not lowered.rolled_back
    assert {rule for rule, where in FIRES_ON.items() if where == name} <= set(lowered.log.counts())


@EACH_RULE
def test_a_rule_that_is_wrong_is_rolled_back_and_named(rule: Any, captured: dict[str, tuple[Program, Trials]]) -> None:
    program, trials = captured[FIRES_ON[rule.name]]
    wrong = mutant(rule, 1 + 1e-6)
    lowered = lower(program, target(*(wrong if r is rule else r for r in TABLE)), trials)
    (refusal,) = lowered.rolled_back
    assert refusal.pass_name == rule.name and refusal.site and "the float64 error" in refusal.reason
    assert lowered.error64 is not None and lowered.error64 < 1e-10
    assert lowered.log.excluded


def test_a_rule_is_told_by_its_own_file() -> None:
    assert all(rule.doc for rule in TABLE)


# -- files


def test_the_report_of_a_file_has_both_errors(tmp_path: Path) -> None:
    model, args = gpt.build("small").eval(), gpt.example("small")
    told = normfuse.export_onnx(model, tmp_path / "gpt.onnx", *args)
    assert told.error_float64 is not None and told.error_float64 < 1e-10
    assert told.error_ratio is not None and 0 < told.error_ratio <= 2
    assert not told.not_verified and not told.compared_with and not told.rolled_back
    assert "of the original's own error" in str(told)
    assert told.to_dict()["error_ratio"] == told.error_ratio


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
        for parameter in self.norm.parameters():
            torch.nn.init.normal_(parameter, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


X = (torch.randn(5, 6) + 1,)


def test_a_wrong_rule_is_named_in_the_report_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.lower.onnx import form

    rules = tuple(mutant(r, 1 + 1e-6) if r.name == "lower_norm" else r for r in TABLE)
    monkeypatch.setattr(form, "TABLE", rules)
    told = normfuse.export_onnx(Small().eval(), tmp_path / "a.onnx", X)
    assert [r.pass_name for r in told.rolled_back] == ["lower_norm"]
    assert told.error_float64 is not None and told.error_float64 < 1e-10
    assert "rolled back" in str(told)


def test_a_file_that_is_wrong_where_its_form_is_right_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = write.translations

    def wrong(opset: int, used: Any) -> Any:
        from onnxscript import values

        table = right(opset, used)
        op: Any = values.Opset("", opset)
        layer_norm = table[write_operators().LAYER_NORM.default]

        def scaled(x: Any, weight: Any, bias: Any, axis: int, eps: float) -> Any:
            return op.Mul(layer_norm(x, weight, bias, axis, eps), op.Constant(value_float=1.05))

        return table | {write_operators().LAYER_NORM.default: scaled}

    monkeypatch.setattr(write, "translations", wrong)
    with pytest.raises(normfuse.LoweringError, match="ONNX file does not compute what the model does"):
        normfuse.export_onnx(Small().eval(), tmp_path / "a.onnx", X, opset=18)
    assert not list(tmp_path.iterdir())
    told = normfuse.export_onnx(Small().eval(), tmp_path / "a.onnx", X, opset=18, verify=False)
    assert told.error_ratio is None and told.not_verified == "nobody asked for it"


def write_operators() -> Any:
    from normfuse.lower.onnx import operators

    return operators


def test_where_the_file_cannot_be_run_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = normfuse.export_onnx(Small().eval(), tmp_path / "a.onnx", X)
    assert told.error_ratio is None and told.not_verified == "onnxruntime is not installed"
    assert told.error_float64 is not None and told.error_float64 < 1e-10
    assert "not run: onnxruntime is not installed" in str(told)


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    """The program before bake goes into the file: what a weight program says, rounded, bit for bit."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = Small().eval()
    optimized = normfuse.optimize(model, X)
    optimized.export_onnx(tmp_path / "a.onnx")
    written = [numpy_helper.to_array(i) for i in onnx.load(str(tmp_path / "a.onnx")).graph.initializer]
    weight, mean = model.first.weight.double(), model.first.weight.double().mean(0)
    wanted = (weight - mean).t().float().detach().numpy()
    assert any(w.shape == wanted.shape and np.array_equal(w, wanted) for w in written)


def test_a_loaded_model_is_compared_with_itself(tmp_path: Path) -> None:
    optimized = normfuse.optimize(Small().eval(), X)  # the model is gone at once
    path = tmp_path / "a.pt2"
    optimized.save(path)
    loaded = normfuse.load(path)
    told = loaded.export_onnx(tmp_path / "a.onnx")
    assert told.error_float64 is None and "no example inputs" in told.not_verified
    for given in (loaded, optimized):
        told = normfuse.export_onnx(given, tmp_path / "a.onnx", X)
        assert told.error_float64 is not None and told.error_float64 < 1e-10 and told.error_ratio is not None
        assert "itself" in told.compared_with and "rounded once already" in str(told)


def test_a_model_that_was_changed_since_is_not_lowered_from(tmp_path: Path) -> None:
    model = Small().eval()
    optimized = normfuse.optimize(model, X)
    assert optimized.unbaked() is not None
    with torch.no_grad():
        model.first.weight.mul_(2)
    assert optimized.unbaked() is None
    told = optimized.export_onnx(tmp_path / "a.onnx")
    assert "itself" in told.compared_with and told.error_ratio is not None


def test_an_optimized_model_does_not_keep_the_one_it_was_made_from() -> None:
    import gc
    import weakref

    model = Small().eval()
    optimized, kept = normfuse.optimize(model, X), weakref.ref(model.first.weight)
    del model
    gc.collect()
    assert kept() is None and optimized.unbaked() is None


def test_the_target_of_a_choice_is_the_table() -> None:
    assert onnx_target(Choice("onnx", 20)).rules == TABLE
