"""A benchmark as a table for a terminal, as Markdown, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from normfuse.benchmark.result import Cell, Key, Result

_TITLES = ("gain", "over plain ONNX", "of ceiling", "first call s", "peak MB", "error/eager")
_ROUNDING = 6e-8
"""Half a unit in the last place of float32: no error is counted smaller."""


def heading(result: Result) -> str:
    told = result.settings
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items() if version)
    return (
        f"Milliseconds per call, {told['dtype']}, {told['threads']} threads, {told['machine']}; {versions}; "
        f"commit {told['commit']}, {told['date']}. Matrix ceiling: {result.ceiling:.0f} GFLOP/s."
    )


def notes(result: Result) -> list[str]:
    mean = result.geometric_mean()
    lines = [
        "gain: best peer / best of normfuse"
        + (f"; geometric mean {mean:.3f}, least {min(filter(None, map(result.ratio, result.cells))):.3f}" if mean else ""),
        "of ceiling: FLOP of the model as given (before branches are merged) / time / the fastest MatMul in this run",
        "first call, peak memory and error against float64 (in units of eager's) are those of the best of normfuse",
    ]
    return [*lines, *(f"failed: {line}" for line in failures(result))]


def names(result: Result) -> list[str]:
    return list(dict.fromkeys(name for cells in result.cells.values() for name in cells))


def _rows(result: Result) -> list[list[str]]:
    return [
        [
            f"{model} x {batch}",
            *(_milliseconds(cells.get(name)) for name in names(result)),
            *_summary(result, (model, batch)),
        ]
        for (model, batch), cells in result.cells.items()
    ]


def table(result: Result) -> Table:
    """Milliseconds by model and contender, the gain over the best peer, and the share of the machine's matrix ceiling."""
    shown = Table(title=heading(result), title_justify="left", caption="\n".join(notes(result)), caption_justify="left")
    shown.add_column("model")
    for name in names(result):
        shown.add_column(name.replace("normfuse-", "nf-"), justify="right", style="bold" if "normfuse" in name else "")
    for title in _TITLES:
        shown.add_column(title, justify="right")
    for row in _rows(result):
        shown.add_row(*row)
    return shown


def markdown(result: Result, title: str, plot: str = "") -> str:
    """The same table, then each contender's first call, peak memory and error."""
    columns = ["model", *names(result), *_TITLES]
    parts = [
        f"# {title}",
        heading(result),
        _markdown_table(columns, _rows(result)),
        "\n".join(f"- {n}" for n in notes(result)),
    ]
    if plot:
        parts.append(f"![speed by model and contender]({plot})")
    if profiles := _profiles(result):
        columns = ["model", "products, convolutions, attention", "the rest"]
        parts += ["## Where the time of normfuse goes, by onnxruntime's profile", _markdown_table(columns, profiles)]
    for what, form, of in (
        ("First call, seconds (export, optimization and compilation included)", "{:.1f}", lambda c: c.first_call_seconds),
        ("Peak memory of a timed process, MB", "{:.0f}", lambda c: c.of("peak_megabytes")),
        ("Relative error against float64", "{:.1e}", lambda c: c.of("error")),
        ("Spread of the rounds, of their median", "{:.0%}", lambda c: c.spread),
    ):
        rows = [
            [f"{m} x {b}", *(form.format(of(cells[n])) if n in cells and cells[n].rounds else "" for n in names(result))]
            for (m, b), cells in result.cells.items()
        ]
        parts += [f"## {what}", _markdown_table(["model", *names(result)], rows)]
    return "\n\n".join(parts) + "\n"


_HEAVY = ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv", "Attention")
_SHOWN = 4


def _profiles(result: Result) -> list[list[str]]:
    """Per model what share goes into the arithmetic that has a ceiling, and which operators hold the rest back."""
    rows: list[list[str]] = []
    for (model, batch), cells in result.cells.items():
        cell = cells.get("normfuse-onnxruntime")
        shares: dict[str, float] = cell.prepared.get("profile", {}) if cell else {}
        if shares:
            rest = [(name, share) for name, share in shares.items() if name not in _HEAVY][:_SHOWN]
            heavy = sum(share for name, share in shares.items() if name in _HEAVY)
            rows.append([f"{model} x {batch}", f"{heavy:.0%}", ", ".join(f"{name} {share:.1%}" for name, share in rest)])
    return rows


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _milliseconds(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.milliseconds:.2f}" if cell.rounds else "failed" if cell.failure else ""


def _summary(result: Result, key: Key) -> list[str]:
    ratio, ours = result.ratio(key), result.best(key, ours=True)
    if ratio is None or ours is None:
        return [""] * len(_TITLES)
    cell, plain = result.cells[key][ours[0]], result.over(key, "onnx")
    return [
        f"{ratio:.2f}",
        f"{plain:.2f}" if plain else "",
        f"{result.share(key, cell.milliseconds):.0%}",
        f"{cell.first_call_seconds:.1f}",
        f"{cell.of('peak_megabytes'):.0f}",
        f"{cell.of('error') / max(result.facts[key]['eager_error'], _ROUNDING):.2f}",
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

    pyplot.rcParams["svg.hashsalt"] = "normfuse"
    keys = [key for key in result.cells if result.best(key, ours=False)]
    timed = list(dict.fromkeys(name for key in keys for name, cell in result.cells[key].items() if cell.rounds))
    figure: Any
    axes: Any
    figure, axes = pyplot.subplots(figsize=(2 + 1.1 * len(keys), 4.5), layout="constrained")
    width = 0.85 / max(len(timed), 1)
    palette = pyplot.get_cmap("Greys")
    for place, name in enumerate(timed):
        ours = name.startswith("normfuse")
        heights = [_speed(result, key, name) for key in keys]
        colour = pyplot.get_cmap("viridis")(0.15 + 0.25 * (place % 4)) if ours else palette(0.3 + 0.1 * place)
        axes.bar([i + place * width for i in range(len(keys))], heights, width, label=name, color=colour)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 for i in range(len(keys))], [f"{m}\nx {b}" for m, b in keys], fontsize=8)
    axes.set_ylabel("speed (best peer = 1)")
    axes.set_title(f"{result.settings['threads']} threads, {result.settings['machine']}, float32", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _speed(result: Result, key: Key, name: str) -> float:
    peer, cell = result.best(key, ours=False), result.cells[key].get(name)
    return peer[1] / cell.milliseconds if peer and cell and cell.rounds else 0.0
