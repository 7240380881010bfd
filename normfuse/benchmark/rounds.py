"""Rounds of a benchmark: every contender in a process of its own, taking turns, so that drift meets all alike."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from normfuse.benchmark.models import MODEL_TYPES
from normfuse.benchmark.result import Cell, Key, Result
from normfuse.benchmark.worker import FILES

CONTENDERS = (
    "eager", "inductor", "inductor-freezing", "onnx", "onnx-transformers",
    "normfuse-torch", "normfuse-inductor", "normfuse-onnxruntime",
)  # fmt: skip
ACCEPTANCE = ("eager", "inductor", "inductor-freezing", "onnx", "onnx-transformers", "normfuse-onnxruntime")
_COMPILED = ("inductor", "inductor-freezing", "normfuse-inductor")
_LIMIT = 900
"""Seconds after which a contender is taken for failed."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    models: Sequence[str]
    contenders: Sequence[str] = ACCEPTANCE
    batches: Sequence[int] = (1,)
    rounds: int = 3
    compiled_rounds: int = 1
    threads: int = 2
    seconds: float = 2.5

    def turns(self, contender: str) -> int:
        """How often a contender is timed: a compiler makes its code anew in every process, and is slow at it."""
        return self.compiled_rounds if contender in _COMPILED else self.rounds

    def cases(self) -> list[Key]:
        return [(model, batch) for model in self.models for batch in self.batches]


@dataclass(frozen=True)
class Step:
    """One process: what it does, and about how many seconds it takes."""

    model: str
    batch: int
    kind: str
    contender: str
    seconds: float

    def __str__(self) -> str:
        what = self.contender if self.kind == "time" else f"{self.kind} {self.contender}".strip()
        return f"{self.model} x {self.batch}: {what}"


def steps(plan: Plan, key: Key, cells: dict[str, Cell], *, known: bool) -> list[Step]:
    """What is still to do for one model: finished cells and failed ones are left as they are."""
    model, batch = key
    heavy = 1.0 + 0.15 * (batch - 1)
    left = {
        name: plan.turns(name) - len(cells[name].rounds)
        for name in plan.contenders
        if not (name in cells and cells[name].failure)
    }
    left = {name: count for name, count in left.items() if count > 0}
    if not left and known:
        return []
    made = [Step(model, batch, "reference", "", 8 * heavy)]
    made += [Step(model, batch, "prepare", name, 12 * heavy) for name in left if name in FILES]
    for turn in range(max(left.values(), default=0)):
        names = list(left) if turn % 2 == 0 else list(left)[::-1]
        made += [
            Step(model, batch, "time", name, _start(name) * heavy + 1.5 * plan.seconds)
            for name in names
            if left[name] > turn
        ]
    return made


def _start(contender: str) -> float:
    return 30 if contender in _COMPILED else 2 if contender in FILES else 6


def run_benchmark(
    plan: Plan, result: Result | None = None, *, tick: Callable[[Step | None, float], None] = lambda *_: None,
    keep: Callable[[Result], None] = lambda _: None,
) -> Result:  # fmt: skip
    """Measure what is missing from the result; `tick` is told of each process before it starts, `keep` after it ended."""
    result = Result() if result is None else result
    result.settings = settings(plan)
    for key in plan.cases():
        cells = result.cells.setdefault(key, {})
        for name in plan.contenders:
            cells.setdefault(name, Cell(failure=_hopeless(name, key[0])))
        todo = steps(plan, key, cells, known=key in result.facts)
        with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
            for step in todo:
                tick(step, step.seconds)
                _take(step, plan, result, cells, folder)
                keep(result)
    tick(None, 0)
    return result


def _hopeless(contender: str, model: str) -> str:
    known = contender != "onnx-transformers" or model in MODEL_TYPES
    return "" if known else "onnxruntime.transformers has no model type for it"


def estimate(plan: Plan, result: Result) -> float:
    """About how many seconds it will take."""
    return sum(
        step.seconds
        for key in plan.cases()
        for step in steps(
            plan,
            key,
            {name: Cell(failure=_hopeless(name, key[0])) for name in plan.contenders} | result.cells.get(key, {}),
            known=key in result.facts,
        )
    )


def _take(step: Step, plan: Plan, result: Result, cells: dict[str, Cell], folder: str) -> None:
    if step.kind == "reference":
        told, failure = _spawn(step, plan, folder)
        if failure:
            for name in plan.contenders:
                cells[name].failure = failure
        else:
            result.facts[step.model, step.batch] = told
        return
    cell = cells[step.contender]
    if cell.failure:
        return
    told, cell.failure = _spawn(step, plan, folder)
    if cell.failure:
        return
    if step.kind == "prepare":
        cell.prepared = told
    else:
        cell.rounds.append(told)


def _spawn(step: Step, plan: Plan, folder: str) -> tuple[dict[str, Any], str]:
    """One process; inductor's caches live in the benchmark's folder, so that its first round starts cold."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(plan.threads),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / (step.contender or "none")),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "normfuse.benchmark.worker", step.kind, step.model, step.contender]
    command += [str(step.batch), str(plan.threads), str(plan.seconds), folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return {}, f"took more than {_LIMIT} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {}, (said[-1] if said else f"exit status {done.returncode}")[:200]
    return json.loads(lines[-1]), ""


# -- on what it was measured


def settings(plan: Plan) -> dict[str, Any]:
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": plan.threads,
        "dtype": "float32",
        "seconds": plan.seconds,
        "date": datetime.now().astimezone().date().isoformat(),
        "commit": _commit(),
        "versions": {name: _version(name) for name in ("torch", "onnx", "onnxruntime", "transformers", "timm", "normfuse")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
