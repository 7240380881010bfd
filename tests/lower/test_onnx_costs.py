"""The table of measurements decides, and the report tells what it said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import normfuse
from normfuse.lower.onnx import costs
from normfuse.models import gpt

from . import onnx_runs


def test_the_table_answers_every_question() -> None:
    for answers in costs.table().values():
        assert set(answers) == set(costs.QUESTIONS)
        for question, (known, _) in costs.QUESTIONS.items():
            assert set(answers[question]) == set(known)
            assert all(cost > 0 for cost in answers[question].values())


def test_another_table_decides_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (args, kwargs) = gpt.build("small"), gpt.example("small")
    optimized = normfuse.optimize(model, args, kwargs, verify=False)
    path = tmp_path / "a.onnx"
    told = optimized.export_onnx(path)
    assert told.count("Attention") == 2
    assert any(line.startswith("attention: Attention ") for line in told.decisions)
    turned = {"CPUExecutionProvider": {question: {a: 1 / c for a, c in answers.items()} for question, answers in
                                       costs.table()["CPUExecutionProvider"].items()}}  # fmt: skip
    monkeypatch.setattr(costs, "table", lambda: turned)
    told = optimized.export_onnx(path)
    assert told.count("Attention") == 0 and told.count("Softmax") == 2
    assert onnx_runs.file_error(model, [(args, kwargs)], path) <= 2
    assert optimized.export_onnx(path, target="onnx").count("Attention") == 2


def test_what_nobody_measured_is_taken_as_on_the_cpu() -> None:
    question = "sum before a norm"
    assert costs.cheapest("NoSuchProvider", question, ("Sum", "Add")) == costs.cheapest(
        "CPUExecutionProvider", question, ("Sum", "Add")
    )
    assert costs.told("NoSuchProvider", question).endswith("(CPUExecutionProvider)")


@pytest.mark.bench
def test_it_can_be_measured_anew() -> None:
    found = costs.measure("CPUExecutionProvider")
    assert set(found) == set(costs.QUESTIONS) and torch.get_num_threads() > 0
