"""Rounds of a benchmark: every contender in a process of its own, taking turns, so that drift meets all alike."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import torch

CONTENDERS = (
    "eager", "inductor", "inductor-freezing", "onnx", "onnx-transformers",
    "normfuse-torch", "normfuse-inductor", "normfuse-onnxruntime",
)  # fmt: skip
_LIMIT = 900
"""Seconds after which a contender is taken for failed."""


@dataclass
class Cell:
    """One contender on one model: what each round said, or why it failed."""

    rounds: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    failure: str = ""

    def of(self, key: str) -> float:
        return median(r[key] for r in self.rounds)

    @property
    def milliseconds(self) -> float:
        return self.of("milliseconds")


@dataclass
class Result:
    """All cells of a benchmark, by model, batch and contender, and what was measured of each model itself."""

    threads: int
    machine: str
    cells: dict[tuple[str, int], dict[str, Cell]] = field(default_factory=dict[tuple[str, int], dict[str, Cell]])
    facts: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict[tuple[str, int], dict[str, float]])

    def best(self, key: tuple[str, int], *, ours: bool) -> tuple[str, float] | None:
        """The fastest contender that is normfuse's, or the fastest that is not."""
        times = {
            name: cell.milliseconds
            for name, cell in self.cells[key].items()
            if cell.rounds and name.startswith("normfuse") == ours
        }
        return min(times.items(), key=lambda item: item[1]) if times else None

    def ratio(self, key: tuple[str, int]) -> float | None:
        """Best peer's time over the best of normfuse's: above 1 is a gain."""
        ours, peer = self.best(key, ours=True), self.best(key, ours=False)
        return peer[1] / ours[1] if ours and peer else None

    def geometric_mean(self) -> float | None:
        ratios = [ratio for key in self.cells if (ratio := self.ratio(key))]
        return exp(sum(log(r) for r in ratios) / len(ratios)) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "machine": self.machine,
            "torch": torch.__version__,
            "geometric_mean": self.geometric_mean(),
            "models": [
                {
                    "model": model,
                    "batch": batch,
                    **self.facts.get((model, batch), {}),
                    "ratio": self.ratio((model, batch)),
                    "contenders": {
                        name: {"failure": c.failure}
                        if c.failure
                        else {k: c.of(k) for k in c.rounds[0]} | {"rounds": len(c.rounds)}
                        for name, c in cells.items()
                    },
                }
                for (model, batch), cells in self.cells.items()
            ],
        }


def run_benchmark(
    models: Sequence[str],
    contenders: Sequence[str] = CONTENDERS,
    *,
    batches: Sequence[int] = (1,),
    rounds: int = 3,
    threads: int = 2,
    tick: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure; `tick` is told of each process before it starts."""
    result = Result(threads, f"{platform.machine()}, {os.cpu_count()} cores")
    for model in models:
        for batch in batches:
            with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
                _one_model(result, model, batch, contenders, rounds, folder, tick)
    return result


def _one_model(
    result: Result, model: str, batch: int, contenders: Sequence[str], rounds: int, folder: str, tick: Callable[[str], None]
) -> None:
    tick(f"{model} x {batch}: reference")
    facts, failure = _spawn(model, "reference", batch, result.threads, folder)
    cells = result.cells[model, batch] = {name: Cell(failure=failure) for name in contenders}
    if failure:
        return
    result.facts[model, batch] = facts
    for turn in range(rounds):
        order = contenders if turn % 2 == 0 else tuple(reversed(contenders))
        for name in order:
            if cells[name].failure:
                continue
            tick(f"{model} x {batch}: {name}, round {turn + 1} of {rounds}")
            told, failure = _spawn(model, name, batch, result.threads, folder)
            cells[name].failure = failure
            if not failure:
                cells[name].rounds.append(told)


def _spawn(model: str, contender: str, batch: int, threads: int, folder: str) -> tuple[dict[str, float], str]:
    """One process; inductor's caches live in the benchmark's folder, so that its first round starts cold."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / contender),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "normfuse.benchmark.worker", model, contender, str(batch), str(threads), folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return {}, f"took more than {_LIMIT} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {}, (said[-1] if said else f"exit status {done.returncode}")[:200]
    return json.loads(lines[-1]), ""
