"""The report as a table for a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from normfuse.report.report import Report

_SITES_SHOWN = 2


def render(report: Report, width: int = 120) -> str:
    """Plain text, as `print(report)` shows it."""
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(renderable(report))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def renderable(report: Report) -> RenderableType:
    """The same for a rich console, with colours."""
    parts: list[RenderableType] = [Text(f"normfuse: {report.model}", style="bold"), _passes(report)]
    if report.refusals:
        parts.append(_refusals(report))
    if report.verification is not None:
        style = "green" if report.verification else "bold red"
        parts.append(Text(str(report.verification), style=style))
    parts.extend(Text(f"rolled back: {r.pass_name} at {r.site}: {r.reason}", style="bold red") for r in report.rolled_back)
    parts.extend(Text(f"note: {note}", style="yellow") for note in report.notes)
    parts.append(Text("  ".join(f"{name} {seconds:.2f} s" for name, seconds in _stages(report)), style="dim"))
    return Group(*parts)


def _passes(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, justify in (("pass", "left"), ("fired", "right"), ("refused", "right"), ("seconds", "right"), ("at", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    names = dict.fromkeys([*report.fired, *(r.pass_name for r in report.refusals)])
    for name in names:
        refused = sum(1 for r in report.refusals if r.pass_name == name)
        sites = report.sites(name)
        more = f" and {len(sites) - _SITES_SHOWN} more" if len(sites) > _SITES_SHOWN else ""
        fired = report.fired.get(name, 0)
        table.add_row(
            Text(name, style="green" if fired else "dim"), str(fired), str(refused or ""),
            f"{report.seconds.get(name, 0.0):.2f}", ", ".join(sites[:_SITES_SHOWN]) + more,
        )  # fmt: skip
    return table


def _refusals(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title="left alone", title_justify="left")
    table.add_column("pass", style="dim", no_wrap=True)
    table.add_column("sites", justify="right")
    table.add_column("reason", overflow="fold", ratio=1)
    for (name, reason), sites in report.refused().items():
        table.add_row(name, str(len(sites)), f"{reason} [at {sites[0]}]".replace("[", "\\["))
    return table


def _stages(report: Report) -> list[tuple[str, float]]:
    stages = ("capture", "raise", "passes", "bake", "verify", "lower", "total")
    return [(name, report.seconds[name]) for name in stages if name in report.seconds]
