"""The row kernels beside their peers: time, bandwidth against a copy of the same run, forward and backward.

    python tools/bench_kernels.py docs/benchmarks/kernels                  on a GPU: the whole table, under 8 minutes
    TRITON_INTERPRET=1 python tools/bench_kernels.py out --tiny            anywhere: every cell once, at sizes of nothing

Each cell is checked before it is timed. Peers: eager torch, torch.compile, and Liger where it is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normfuse.functional as nf

EPS = 1e-6
Function = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """A function, its eager spelling, its parameters (counts of vectors and scalars), and the matrices that it moves."""

    ours: Function
    eager: Function
    vectors: int
    scalars: int
    forward: int
    backward: int


def _added(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    added = x + x
    return F.rms_norm(added, x.shape[-1:], w, EPS), added


SUBJECTS = {
    "rms_norm": Subject(
        lambda x, w, k: nf.rms_norm(x, w, eps=EPS, kernel=k), lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), 1, 0, 2, 3
    ),
    "layer_norm": Subject(
        lambda x, w, b, k: nf.layer_norm(x, w, b, eps=EPS, kernel=k),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS), 2, 0, 2, 3,
    ),
    "add_rms_norm": Subject(lambda x, w, k: nf.add_rms_norm(x, x, w, eps=EPS, kernel=k), _added, 1, 0, 4, 4),
    "softmax": Subject(lambda x, k: nf.softmax(x, kernel=k), lambda x: F.softmax(x, -1), 0, 0, 2, 3),
    "dyt": Subject(
        lambda x, a, w, b, k: nf.dyt(x, a, w, b, kernel=k), lambda x, a, w, b: torch.tanh(a * x) * w + b, 2, 1, 2, 3
    ),
}  # fmt: skip
LIGER = {"rms_norm": "rms_norm.LigerRMSNormFunction", "layer_norm": "layer_norm.LigerLayerNormFunction"}


@dataclass(frozen=True)
class Cell:
    """One measurement. `of_copy` is its bandwidth over that of a copy of as many bytes."""

    function: str
    direction: str
    rows: int
    columns: int
    dtype: str
    peer: str
    milliseconds: float
    gigabytes_per_second: float
    of_copy: float


def peers(name: str, *, tiny: bool, kernel: str) -> dict[str, Function]:
    subject = SUBJECTS[name]
    found: dict[str, Function] = {"normfuse": lambda *t: subject.ours(*t, kernel), "eager": subject.eager}
    if tiny:
        return found
    found["compile"] = torch.compile(subject.eager, dynamic=False)
    found["max-autotune"] = torch.compile(subject.eager, dynamic=False, mode="max-autotune-no-cudagraphs")
    if name in LIGER and find_spec("liger_kernel"):
        module, member = LIGER[name].split(".")
        apply = getattr(import_module(f"liger_kernel.ops.{module}"), member).apply
        found["liger"] = lambda *t: apply(*t, EPS)
    return found


def inputs(subject: Subject, rows: int, columns: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    x = torch.randn(rows, columns, device=device) + 0.5
    others = [torch.rand(1, device=device) + 0.5] * subject.scalars
    others += [torch.rand(columns, device=device) + 0.5 for _ in range(subject.vectors)]
    return [t.to(dtype).requires_grad_() for t in (x, *others)]


def flat(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def check(name: str, found: Function, tensors: list[Tensor]) -> None:
    """The forward and every gradient within a few roundings of eager torch in float64."""
    subject = SUBJECTS[name]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    results = []
    for function, leaves in ((found, tensors), (subject.eager, exact)):
        y = flat(function(*leaves))
        results.append([*y, *torch.autograd.grad(y, leaves, [torch.ones_like(each) for each in y])])
    for a, b in zip(*results, strict=True):
        worst = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3))
        if worst > 0.1:
            raise SystemExit(f"{name} is wrong by {worst:.1e} of the largest entry: nothing is timed")


def timed(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The median time of a call in milliseconds, with what it reads out of the cache."""
    if device == "cpu":
        times: list[float] = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def cells(name: str, rows: int, columns: int, dtype: torch.dtype, device: str, *, tiny: bool, kernel: str) -> Iterator[Cell]:
    subject, repeats = SUBJECTS[name], 2 if tiny else 30
    tensors = inputs(subject, rows, columns, dtype, device)
    size = rows * columns * dtype.itemsize
    label = str(dtype).removeprefix("torch.")
    target = torch.empty_like(tensors[0])
    copied = 2 * size / timed(lambda: target.copy_(tensors[0].detach()), device, repeats) / 1e6
    for peer, function in peers(name, tiny=tiny, kernel=kernel).items():
        if peer == "normfuse":
            check(name, function, tensors)
        y = flat(function(*tensors))
        grads = [torch.ones_like(each) for each in y]

        def forward(call: Function = function) -> Any:
            with torch.no_grad():
                return call(*tensors)

        def backward(y: list[Tensor] = y, grads: list[Tensor] = grads) -> Any:
            return torch.autograd.grad(y, tensors, grads, retain_graph=True)

        for direction, call, moved in (("forward", forward, subject.forward), ("backward", backward, subject.backward)):
            call()
            spent = timed(call, device, repeats)
            speed = moved * size / spent / 1e6
            yield Cell(name, direction, rows, columns, label, peer, spent, speed, speed / copied)


def sizes(*, tiny: bool) -> Iterator[tuple[int, int]]:
    if tiny:
        yield from ((3, 40), (2, 8200))
        return
    for columns in (128, 512, 1024, 4096, 8192, 16384, 65536, 262144):
        for rows in (128, 2048, 32768):
            if rows * columns <= 2**29:
                yield rows, columns


def table(found: list[Cell]) -> str:
    lines = [
        "| function | direction | rows | columns | dtype | peer | ms | GB/s | of copy |",
        "|---|---|--:|--:|---|---|--:|--:|--:|",
    ]
    for c in found:
        lines.append(
            f"| {c.function} | {c.direction} | {c.rows} | {c.columns} | {c.dtype} | {c.peer} | {c.milliseconds:.3f} "
            f"| {c.gigabytes_per_second:.1f} | {100 * c.of_copy:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def plot(found: list[Cell], path: Path) -> None:
    if find_spec("matplotlib") is None:
        return
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(cell.function for cell in found))
    figure, axes = plt.subplots(max(len(names), 1), 2, figsize=(10, 3 * max(len(names), 1)), squeeze=False)
    for line, name in enumerate(names):
        for column, direction in enumerate(("forward", "backward")):
            axis = axes[line][column]
            here = [c for c in found if c.function == name and c.direction == direction]
            most = max((c.rows for c in here), default=0)
            for peer in dict.fromkeys(c.peer for c in here):
                points = sorted((c.columns, c.of_copy) for c in here if c.peer == peer and c.rows == most)
                axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=peer)
            axis.set(title=f"{name}, {direction}, {most} rows", xscale="log", xlabel="columns", ylabel="of a copy")
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("functions", nargs="*", help="all by default")
    parser.add_argument("--tiny", action="store_true", help="every cell once, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=450.0, help="no cell is begun after this many")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        raise SystemExit("no GPU: --tiny with TRITON_INTERPRET=1 runs every cell in the interpreter")
    began, found = time.monotonic(), list[Cell]()
    for dtype in (torch.float32,) if asked.tiny else (torch.bfloat16, torch.float16, torch.float32):
        for name in asked.functions or SUBJECTS:
            for rows, columns in sizes(tiny=asked.tiny):
                if time.monotonic() - began < asked.seconds:
                    found += cells(name, rows, columns, dtype, device, tiny=asked.tiny, kernel="triton")
    asked.folder.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else "the interpreter on a CPU: times mean nothing"
    heading = f"# Row kernels\n\n{machine}, torch {torch.__version__}\n\n"
    (asked.folder / "kernels.md").write_text(heading + table(found), encoding="utf-8")
    record = {"machine": machine, "torch": torch.__version__, "cells": [asdict(cell) for cell in found]}
    (asked.folder / "kernels.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(found, asked.folder / "kernels.svg")
    print(table(found))


if __name__ == "__main__":
    main()
