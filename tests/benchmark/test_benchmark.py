"""The benchmark's bookkeeping: what is run in which order, what is kept, what a table says. Times are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import normfuse
from normfuse.benchmark import Plan, Result, estimate, peers, read, rounds, run_benchmark
from normfuse.benchmark.models import SUITES, load
from normfuse.benchmark.result import Cell
from normfuse.benchmark.show import markdown, plot
from normfuse.errors import NormfuseError

KEY = ("gpt", 1)
TIMES = {"eager": 40.0, "onnx": 20.0, "normfuse-onnxruntime": 16.0, "inductor": 30.0}


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The processes that would have run, in order."""
    seen: list[str] = []

    def spawn(step: rounds.Step, plan: Plan, folder: str) -> tuple[dict[str, Any], str]:
        seen.append(f"{step.kind} {step.contender}".strip())
        if step.kind == "reference":
            return {"gflop": 2.0, "ceiling_gflops": 500.0, "eager_error": 1e-6}, ""
        if step.kind == "prepare":
            return {"first_call_seconds": 3.0, "profile": {"Gemm": 0.7, "Gelu": 0.2, "Conv": 0.1}}, ""
        if step.contender == "inductor":
            return {}, "it broke"
        return {"milliseconds": TIMES[step.contender], "error": 1e-6, "peak_megabytes": 9.0, "first_call_seconds": 1.0}, ""

    monkeypatch.setattr(rounds, "_spawn", spawn)
    return seen


def test_contenders_take_turns_and_files_are_made_once(spawned: list[str]) -> None:
    plan = Plan(["gpt"], ["eager", "inductor", "onnx", "normfuse-onnxruntime"], rounds=2)
    result = run_benchmark(plan)
    assert spawned == [
        "reference", "prepare onnx", "prepare normfuse-onnxruntime",
        "time eager", "time inductor", "time onnx", "time normfuse-onnxruntime",
        "time normfuse-onnxruntime", "time onnx", "time eager",
    ]  # fmt: skip
    assert result.ratio(KEY) == 20 / 16
    assert result.over(KEY, "eager") == 40 / 16
    assert result.share(KEY, 16.0) == pytest.approx(2 / 0.016 / 500)
    assert result.cells[KEY]["inductor"].failure == "it broke"


def test_what_is_finished_is_kept_and_the_rest_is_measured(spawned: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    run_benchmark(Plan(["gpt"], ["onnx"], rounds=2), keep=lambda result: result.save(kept))
    plan = Plan(["gpt"], ["onnx", "normfuse-onnxruntime"], rounds=2)
    result = read(kept)
    spawned.clear()
    assert 0 < estimate(plan, result) < estimate(plan, Result())
    run_benchmark(plan, result)
    assert "prepare onnx" not in spawned and "time onnx" not in spawned
    assert spawned.count("time normfuse-onnxruntime") == 2
    assert estimate(plan, result) == 0


def test_tables_tell_failures_and_the_geometric_mean(spawned: list[str], tmp_path: Path) -> None:
    plan = Plan(["gpt"], ["eager", "inductor", "onnx", "onnx-transformers", "normfuse-onnxruntime"], batches=(1, 8))
    result = run_benchmark(plan)
    text = markdown(result, "a title", "plot.svg")
    assert "| gpt x 1 | 40.00 | failed | 20.00 | failed | 16.00 | 1.25 | 1.25 |" in text
    assert "failed: gpt x 8, inductor: it broke" in text
    assert "no model type" in text
    assert "geometric mean 1.250, least 1.250" in text
    assert "| gpt x 8 | 80% | Gelu 20.0% |" in text
    assert str(result.settings["versions"]["torch"]) in text
    plot(result, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_profile_shares_out_the_time_of_the_operators(tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    path = tmp_path / "a.onnx"
    normfuse.export_onnx(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).eval(), path, (x,))
    shares = peers.profile(path, [x])
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["Gelu"] > 0 and list(shares.values()) == sorted(shares.values(), reverse=True)


def test_another_file_is_no_saved_benchmark(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NormfuseError, match=r"x\.json is no saved benchmark"):
        read(tmp_path / "x.json")


def test_a_cell_tells_how_far_its_rounds_lie_apart() -> None:
    assert Cell(rounds=[{"milliseconds": 9.0}, {"milliseconds": 10.0}, {"milliseconds": 12.0}]).spread == pytest.approx(0.3)


def test_the_suites_hold_what_the_acceptance_names() -> None:
    assert len(SUITES["plain"]) == 10
    assert len(SUITES["mergeable"]) == 5


def test_rep_batch_norms_are_trained_ones() -> None:
    model: Any = load("deit-ti-repbn", 2).model
    norms = [m for m in model.modules() if hasattr(m, "eta")]
    assert len(norms) == 25
    assert not [m for m in model.modules() if type(m).__name__ == "LayerNorm"]
    for norm in norms:
        assert float(norm.eta.detach()) != 1 and float(norm.norm.running_mean.abs().min()) > 0
        assert float((norm.norm.weight - 1).abs().min()) > 0 and float(norm.norm.bias.abs().min()) > 0
