"""`normfuse bench` and tools/bench.py: choose, measure with a progress bar, keep after every process, show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normfuse.benchmark.models import SUITES
from normfuse.benchmark.result import Result, read
from normfuse.benchmark.rounds import ACCEPTANCE, CONTENDERS, Plan, Step, estimate, run_benchmark
from normfuse.benchmark.show import markdown, plot, table
from normfuse.errors import NormfuseError


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL...]", help="A specimen, pkg.module:callable, bert-base, ..., hf:Class or timm:name."),
    ] = None,
    suite: Annotated[list[str] | None, typer.Option(help=f"Models of a suite: {', '.join(SUITES)}.")] = None,
    contenders: Annotated[str, typer.Option(help=f"Some of {','.join(CONTENDERS)}.")] = ",".join(ACCEPTANCE),
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", help="Batch sizes (may be given often).")] = None,
    rounds: Annotated[int, typer.Option(help="How often every contender has its turn.")] = 3,
    compiled_rounds: Annotated[int, typer.Option(help="The same for inductor, which compiles each time.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long one turn calls the model.")] = 2.5,
    threads: Annotated[int, typer.Option(help="Threads of every contender.")] = 2,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write OUTPUT.md, OUTPUT.json and OUTPUT.svg.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what OUTPUT.json holds, measure the rest.")] = False,
    refresh_costs: Annotated[
        bool, typer.Option("--refresh-costs", help="Only measure anew what the ONNX lowering decides by.")
    ] = False,
) -> None:
    """Time models in eager torch, inductor, onnxruntime and normfuse's backends, each in a process of its own.

    Example: tools/bench.py --suite plain -b 1 -b 8 --output docs/benchmarks/plain
    """
    if refresh_costs:
        _refresh()
        return
    plan = Plan(
        _models(models or [], suite or []), _contenders(contenders), batch or [1], rounds, compiled_rounds, threads, seconds
    )
    kept = None if output is None else output.with_name(f"{output.name}.json")
    result = read(kept) if resume and kept is not None and kept.exists() else Result()
    _run(plan, result, kept)
    out = Console()
    out.print(table(result), highlight=False)
    if output is not None:
        plot(result, output.with_name(f"{output.name}.svg"))
        text = markdown(result, f"Benchmark: {output.name}", f"{output.name}.svg")
        output.with_name(f"{output.name}.md").write_text(text, encoding="utf-8")
        out.print(f"wrote {output}.md, .json and .svg")


def _refresh() -> None:
    from normfuse.benchmark import onnx_costs
    from normfuse.lower import costs

    console = Console()
    onnx_costs.refresh(tick=lambda question: console.print(f"measuring: {question}"))
    for question, known in costs.table()["CPUExecutionProvider"].items():
        prices = Table("size", *known["costs"], title=f"{question}, us on one thread", title_justify="left")
        for size, *times in zip(known["sizes"], *known["costs"].values(), strict=True):
            prices.add_row(" x ".join(map(str, size)), *(f"{taken:.0f}" for taken in times))
        console.print(prices)
    console.print(f"wrote {costs.TABLE.name}")


def _models(models: Sequence[str], suites: Sequence[str]) -> list[str]:
    if wrong := [name for name in suites if name not in SUITES]:
        raise NormfuseError(f"unknown suite {wrong[0]!r}: choose among {', '.join(SUITES)}")
    chosen = [*(name for suite in suites for name in SUITES[suite]), *models]
    if not chosen:
        raise NormfuseError(f"name a model, or a suite: --suite {' or '.join(SUITES)}")
    return list(dict.fromkeys(chosen))


def _contenders(text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in chosen if name not in CONTENDERS]:
        raise NormfuseError(f"unknown contender {wrong[0]!r}: choose among {', '.join(CONTENDERS)}")
    return chosen


def _run(plan: Plan, result: Result, kept: Path | None) -> None:
    console = Console(stderr=True)
    total = estimate(plan, result)
    console.print(f"about {total / 60:.0f} minutes for {len(plan.cases())} models and batches", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total)
        before = 0.0

        def tick(step: Step | None, seconds: float) -> None:
            nonlocal before
            progress.update(task, advance=before, description=str(step) if step else "done")
            before = seconds

        run_benchmark(plan, result, tick=tick, keep=lambda r: r.save(kept) if kept is not None else None)
