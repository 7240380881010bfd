"""What a report, an inventory or a benchmark has to show, without saying how: lines and tables on a page.

The printers beside this file (`terminal`, `html`) know nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "strong", "good", "bad", "note", "dim", "green", "magenta", "yellow", "blue", "red", "cyan"]


@dataclass(frozen=True)
class Cell:
    """A text with a tone; `share` in 0..1 draws a bar of that length where bars can be drawn."""

    text: str
    tone: Tone = ""
    share: float | None = None


Item = Cell | str | int | float


@dataclass(frozen=True)
class Column:
    """`total` stands below the column. `wraps`: its texts may take several lines."""

    title: str
    align: Literal["left", "right"] = "left"
    wraps: bool = False
    total: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Line:
    """A sentence of its own."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Section:
    """A table. `summary`: long, and folded under this sentence where things can be folded, left out elsewhere.

    `below`: where the table is too wide, its last column stands in lines below it, each led by the row's first cell.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Item, ...], ...]
    summary: str = ""
    below: bool = False
    ruled: bool = False


@dataclass(frozen=True)
class Page:
    """A title and what stands under it."""

    title: str
    parts: tuple[Line | Section, ...]


def cell(item: Item) -> Cell:
    """Any item as a cell; numbers with a point keep two digits behind it."""
    if isinstance(item, Cell):
        return item
    return Cell(f"{item:.2f}" if isinstance(item, float) else str(item))
