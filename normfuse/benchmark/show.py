"""A benchmark as a table for a terminal, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from normfuse.benchmark.rounds import Cell, Result


def table(result: Result) -> Table:
    """Milliseconds by model and contender, the gain over the best peer, and the share of the machine's matrix ceiling."""
    names = list(dict.fromkeys(name for cells in result.cells.values() for name in cells))
    shown = Table(title=f"milliseconds per call, {result.threads} threads, {result.machine}", title_justify="left")
    shown.add_column("model")
    for name in names:
        shown.add_column(name.replace("normfuse-", "nf-"), justify="right", style="bold" if "normfuse" in name else "")
    for title in ("gain", "of ceiling", "first call s", "peak MB", "error/eager"):
        shown.add_column(title, justify="right")
    for (model, batch), cells in result.cells.items():
        row = [f"{model} x {batch}", *(_milliseconds(cells[name]) for name in names)]
        shown.add_row(*row, *_summary(result, (model, batch)))
    mean = result.geometric_mean()
    shown.caption = f"gain: best peer / best of normfuse; geometric mean {mean:.2f}" if mean else ""
    return shown


def _milliseconds(cell: Cell) -> str:
    return f"{cell.milliseconds:.2f}" if cell.rounds else "failed"


def _summary(result: Result, key: tuple[str, int]) -> list[str]:
    ratio, ours = result.ratio(key), result.best(key, ours=True)
    if ratio is None or ours is None:
        return ["", "", "", "", ""]
    cell, facts = result.cells[key][ours[0]], result.facts[key]
    share = facts["gflop"] / (cell.milliseconds / 1e3) / facts["ceiling_gflops"]
    errors = cell.of("error") / max(facts["eager_error"], 6e-8)
    return [
        f"{ratio:.2f}",
        f"{share:.0%}",
        f"{cell.rounds[0]['first_call_seconds']:.1f}",
        f"{cell.of('peak_megabytes'):.0f}",
        f"{errors:.2f}",
    ]


def failures(result: Result) -> list[str]:
    return [
        f"{model} x {batch}, {name}: {cell.failure}"
        for (model, batch), cells in result.cells.items()
        for name, cell in cells.items()
        if cell.failure
    ]


def plot(result: Result, path: Path) -> None:
    """Bars of speed relative to the best peer, one group per model; a .png or .svg file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    keys = [key for key in result.cells if result.best(key, ours=False)]
    names = list(dict.fromkeys(name for key in keys for name, cell in result.cells[key].items() if cell.rounds))
    figure: Any
    axes: Any
    figure, axes = pyplot.subplots(figsize=(2 + 1.1 * len(keys), 4.5), layout="constrained")
    width = 0.85 / max(len(names), 1)
    palette = pyplot.get_cmap("Greys")
    for place, name in enumerate(names):
        ours = name.startswith("normfuse")
        heights = [_speed(result, key, name) for key in keys]
        colour = pyplot.get_cmap("viridis")(0.15 + 0.25 * (place % 4)) if ours else palette(0.3 + 0.1 * place)
        axes.bar([i + place * width for i in range(len(keys))], heights, width, label=name, color=colour)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 for i in range(len(keys))], [f"{m}\nx {b}" for m, b in keys], fontsize=8)
    axes.set_ylabel("speed (best peer = 1)")
    axes.set_title(f"{result.threads} threads, {result.machine}, float32", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _speed(result: Result, key: tuple[str, int], name: str) -> float:
    peer, cell = result.best(key, ours=False), result.cells[key].get(name)
    return peer[1] / cell.milliseconds if peer and cell and cell.rounds else 0.0
