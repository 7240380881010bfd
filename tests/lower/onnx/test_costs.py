"""The table of measurements decides, and the report tells what it said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import normfuse
from normfuse.benchmark import onnx_costs
from normfuse.lower import costs
from normfuse.models import gpt

from . import runs as onnx_runs

CPU = "CPUExecutionProvider"


def test_the_table_answers_every_question() -> None:
    for answers in costs.table().values():
        assert set(answers) == set(onnx_costs.QUESTIONS)
        for question, (known, sizes) in onnx_costs.QUESTIONS.items():
            assert [tuple(size) for size in answers[question]["sizes"]] == list(sizes)
            assert set(answers[question]["costs"]) == set(known)
            assert all(len(times) == len(sizes) and min(times) > 0 for times in answers[question]["costs"].values())


def test_another_table_decides_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (args, kwargs) = gpt.build("small"), gpt.example("small")
    optimized = normfuse.optimize(model, args, kwargs, dynamic_shapes=None, verify=False)
    path = tmp_path / "a.onnx"
    told = optimized.export_onnx(path)
    assert told.count("Attention") == 2
    assert any(line.startswith("attention: Attention ") for line in told.decisions)
    turned = {CPU: {question: _turned(answers) for question, answers in costs.table()[CPU].items()}}
    monkeypatch.setattr(costs, "table", lambda: turned)
    told = optimized.export_onnx(path)
    assert told.count("Attention") == 0 and told.count("Softmax") == 2 and told.count("FusedMatMul") == 2
    assert onnx_runs.file_error(model, [(args, kwargs)], path) <= 2
    assert optimized.export_onnx(path, target="onnx").count("Attention") == 2


def _turned(answers: dict[str, Any]) -> dict[str, Any]:
    return {"sizes": answers["sizes"], "costs": {a: [1 / t for t in times] for a, times in answers["costs"].items()}}


class Block(nn.Module):
    """Attention of as many heads as wanted, masked by a table of biases, then a GELU."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(heads, 49, 49))
        self.hidden = nn.Linear(96, 384)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.projections)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return functional.gelu(self.hidden(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("heads", "threads", "operator"), [(3, 2, "Softmax"), (4, 2, "Attention"), (3, 1, "Attention")])
def test_heads_that_leave_a_thread_idle_are_products(heads: int, threads: int, operator: str, tmp_path: Path) -> None:
    model, x, before = Block(heads).eval(), torch.randn(1, 49, 96), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        told = normfuse.export_onnx(model, tmp_path / "a.onnx", (x,))
        standard = normfuse.export_onnx(model, tmp_path / "b.onnx", (x,), target="onnx")
    finally:
        torch.set_num_threads(before)
    assert told.count(operator) == 1 and told.count("Attention") + told.count("Softmax") == 1
    assert standard.count("Attention") == 1
    for name in ("a.onnx", "b.onnx"):
        sizes = [((torch.randn(batch, 49, 96),), {}) for batch in (1, 3)]
        assert onnx_runs.file_error(model, sizes, tmp_path / name) <= 2


def test_what_has_no_kernel_stays_one_operator(tmp_path: Path) -> None:
    """The products are float32 alone in onnxruntime's own operators."""
    model = Block(3).eval().double()
    told = normfuse.export_onnx(model, tmp_path / "a.onnx", (torch.randn(1, 49, 96, dtype=torch.float64),))
    assert told.count("Attention") == 1 and told.count("FusedMatMul") == 0


def test_the_bias_goes_where_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(4).eval(), torch.randn(1, 49, 96)
    for cheap, dear, count in (("Gelu", "BiasGelu", 0), ("BiasGelu", "Gelu", 1)):
        known = costs.table()[CPU]
        question = known["gelu after a bias"]
        n = len(question["sizes"])
        told = {CPU: known | {"gelu after a bias": {"sizes": question["sizes"], "costs": {cheap: [1] * n, dear: [2] * n}}}}
        with monkeypatch.context() as patch:
            patch.setattr(costs, "table", lambda told=told: told)
            path = tmp_path / f"{cheap}.onnx"
            assert normfuse.export_onnx(model, path, (x,)).count("BiasGelu") == count
            assert onnx_runs.file_error(model, [((x,), {})], path) <= 2


def test_what_nobody_measured_is_taken_as_on_the_cpu() -> None:
    question, size = "sum before a norm", (128, 768)
    assert costs.costs("NoSuchProvider", question, size, 2) == costs.costs(CPU, question, size, 2)


def test_the_nearest_size_answers() -> None:
    sizes, times = costs.table()[CPU]["attention"]["sizes"], costs.table()[CPU]["attention"]["costs"]["Attention"]
    for size, taken in zip(sizes, times, strict=True):
        near = (size[0], size[1] + 1, *size[2:])
        assert costs.costs(CPU, "attention", near, 1)["Attention"] == taken


@pytest.mark.bench
def test_it_can_be_measured_anew() -> None:
    found = onnx_costs.measure(CPU)
    assert set(found) == set(onnx_costs.QUESTIONS) and torch.get_num_threads() > 0
