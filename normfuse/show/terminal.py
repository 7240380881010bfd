"""A page in a terminal, by rich."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from normfuse.show.page import Cell, Column, Item, Line, Page, Section, cell

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

T = TypeVar("T")

WIDTH = 120
_ROOM = 108
"""Columns from which on a wide table has room for its last column."""
_STYLES = {"strong": "bold", "good": "green", "bad": "bold red", "note": "yellow"}


def render(page: Page, width: int = WIDTH) -> str:
    """Plain text, as `print` shows it."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(renderable(page))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a progress bar where somebody looks."""
    from rich import progress

    return progress.track(items, description=what, disable=not sys.stderr.isatty(), transient=True)


def renderable(page: Page) -> RenderableType:
    """The same for a rich console, with colours."""
    from rich.console import Group

    parts: list[Any] = [_text(Cell(page.title, "strong"))] if page.title else []
    for part in page.parts:
        if isinstance(part, Line):
            parts.append(_text(Cell(part.text, part.tone)))
        elif not part.summary:
            parts.append(_Wide(part) if part.below else _table(part, part.columns, part.rows))
    return Group(*parts)


@dataclass
class _Wide:
    """A table whose last column stands below it where the console is narrow."""

    section: Section

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, rows = self.section.columns, self.section.rows
        if options.max_width >= _ROOM:
            yield _table(self.section, columns, rows)
            return
        yield _table(self.section, columns[:-1], tuple(row[:-1] for row in rows))
        for row in rows:
            yield _text(Cell(f" {cell(row[0]).text} ", "strong"), cell(row[-1]))


def _table(section: Section, columns: tuple[Column, ...], rows: tuple[tuple[Item, ...], ...]) -> Table:
    from rich import box
    from rich.table import Table

    ruled = section.ruled
    table = Table(
        box=box.SIMPLE_HEAD if ruled else None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0),
        title=_text(Cell(section.title, "strong" if ruled else "")) if section.title else None, title_justify="left",
        show_footer=any(column.total for column in columns),
    )  # fmt: skip
    for column in columns:
        wraps, style = column.wraps, _STYLES.get(column.tone, column.tone)
        table.add_column(
            column.title, column.total, justify=column.align, style=style, footer_style="bold",
            no_wrap=not wraps, overflow="fold", ratio=1 if wraps else None,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(_text(cell(item)) for item in row))
    return table


def _text(*cells: Cell) -> Text:
    from rich.text import Text

    return Text.assemble(*((c.text, _STYLES.get(c.tone, c.tone)) for c in cells))
