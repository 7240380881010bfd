"""The inventory as a table for a terminal: like patterns in one row, sites that differ by numbers alone in one name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from normfuse.site_costs import human

if TYPE_CHECKING:
    from normfuse.inventory import Inventory, Pattern

_SITES_SHOWN = 2
_WIDE = 108
_COLUMNS = (
    ("kind", "left"), ("count", "right"), ("placement", "left"), ("axes", "left"), ("eps", "left"), ("affine", "left"),
    ("moved", "right"), ("FLOP", "right"),
)  # fmt: skip
_PLACED = {"pre": "green", "post": "magenta", "sandwich": "yellow", "qk": "blue", "final": "red", "embedding": "cyan"}


@dataclass
class InventoryTable:
    """The table, as wide as the console allows: where there is no room for the sites, they stand below it."""

    inventory: Inventory

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        groups: dict[tuple[Any, ...], list[Pattern]] = {}
        for p in self.inventory.patterns:
            groups.setdefault((p.kind, p.placement, p.axes, p.eps, p.affine), []).append(p)
        wide = options.max_width >= _WIDE
        yield self._table(list(groups.values()), wide=wide)
        if not wide:
            for patterns in groups.values():
                yield Text.assemble((f" {patterns[0].kind} ", "bold"), *_where([p.site for p in patterns]))
        yield from (Text(f"note: {note}", style="yellow") for note in self.inventory.notes)

    def _table(self, groups: Sequence[Sequence[Pattern]], *, wide: bool) -> Table:
        title = Text(self.inventory.model or "inventory", style="bold")
        found = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), title=title, show_footer=True)
        found.title_justify = "left"
        for (name, justify), total in zip(_COLUMNS, _totals(self.inventory.patterns), strict=True):
            found.add_column(name, total, justify=justify, no_wrap=True, footer_style="bold")  # type: ignore[arg-type]
        if wide:
            found.add_column("where", overflow="fold", ratio=1)
        for patterns in groups:
            where = [Text.assemble(*_where([p.site for p in patterns]))] if wide else []
            found.add_row(*_row(patterns), *where)
        if not groups:
            found.add_row("nothing", "0")
        return found


def _row(patterns: Sequence[Pattern]) -> list[RenderableType]:
    first = patterns[0]
    placed = "" if first.placement == "other" else first.placement
    return [
        Text(first.kind, style="bold"),
        str(len(patterns)),
        Text(placed, style=_PLACED.get(placed, "")),
        ", ".join(map(str, first.axes)),
        "" if first.eps is None else f"{first.eps:g}",
        "" if first.affine in ("", "none") else first.affine.replace(" and ", ", "),
        human(sum(p.bytes for p in patterns), "B"),
        human(sum(p.flop for p in patterns)),
    ]


def _totals(patterns: Sequence[Pattern]) -> list[str]:
    moved, computed = sum(p.bytes for p in patterns), sum(p.flop for p in patterns)
    return ["total", str(len(patterns)), "", "", "", "", human(moved, "B"), human(computed)]


def _where(sites: Sequence[str]) -> list[str | tuple[str, str]]:
    """`h.{0-11}.{ln_1, ln_2}`, and the source lines."""
    names = collapsed(dict.fromkeys(s.partition(" (")[0] for s in sites))
    lines = list(dict.fromkeys(s.partition(" (")[2].rstrip(")") for s in sites if " (" in s))
    text = ", ".join(names[:_SITES_SHOWN])
    if len(names) > _SITES_SHOWN:
        text += f" and {len(names) - _SITES_SHOWN} more"
    source = ", ".join(lines[:_SITES_SHOWN]) + (", ..." if len(lines) > _SITES_SHOWN else "")
    return [text, (f"  {source}" if source else "", "dim")]


def collapsed(names: Iterable[str]) -> list[str]:
    """Names that differ by numbers or by their last part, as one: `h.0.a`, `h.0.b`, `h.1.a`, `h.1.b` -> `h.{0-1}.{a, b}`."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = re.split(r"(?<![A-Za-z_\d])(\d+)(?![A-Za-z_\d])", name)
        groups.setdefault(tuple(parts[::2]), []).append(tuple(int(n) for n in parts[1::2]))
    found: list[str] = []
    for texts, numbers in groups.items():
        spans = [_span(sorted(set(column))) for column in zip(*numbers, strict=True)]
        found.append("".join(text + span for text, span in zip(texts, [*spans, ""], strict=True)))
    return _by_last_part(found)


def _by_last_part(names: Sequence[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        head, _, last = name.rpartition(".")
        groups.setdefault(head, []).append(last)
    found: list[str] = []
    for head, lasts in groups.items():
        several = "{" + ", ".join(lasts) + "}" if len(lasts) > 1 and head else ", ".join(lasts)
        found.append(f"{head}.{several}" if head else several)
    return found


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "}"
