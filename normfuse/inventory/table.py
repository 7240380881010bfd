"""The inventory as a page: like patterns in one row, sites that differ by numbers alone in one name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from normfuse.inventory.costs import human
from normfuse.inventory.pattern import Pattern
from normfuse.show.page import Cell, Column, Item, Line, Page, Section, Tone

_SITES_SHOWN = 2
_COLUMNS = ("kind", "count", "placement", "axes", "eps", "affine", "moved", "FLOP")
_NUMBERS = ("count", "moved", "FLOP")
_PLACED: dict[str, Tone] = {
    "pre": "green", "post": "magenta", "sandwich": "yellow", "qk": "blue", "final": "red", "embedding": "cyan",
}  # fmt: skip


def page_of(model: str, patterns: Sequence[Pattern], notes: Sequence[str]) -> Page:
    """The table, its total below; where there is no room for the sites, they stand below it."""
    groups: dict[tuple[Any, ...], list[Pattern]] = {}
    for p in patterns:
        groups.setdefault((p.kind, p.placement, p.axes, p.eps, p.eps_place, p.affine), []).append(p)
    rows = tuple((*_row(alike), _where([p.site for p in alike])) for alike in groups.values())
    titles = zip(_COLUMNS, _totals(patterns), strict=True)
    columns = [Column(name, "right" if name in _NUMBERS else "left", total=total) for name, total in titles]
    nothing: tuple[Item, ...] = ("nothing", "0", *("" for _ in _COLUMNS[2:]), "")
    table = Section(
        model or "inventory", (*columns, Column("where", wraps=True)), rows or (nothing,), below=bool(rows), ruled=True
    )
    return Page("", (table, *(Line(f"note: {note}", "note") for note in notes)))


def _row(patterns: Sequence[Pattern]) -> tuple[Item, ...]:
    first = patterns[0]
    placed = "" if first.placement == "other" else first.placement
    return (
        Cell(first.kind, "strong"),
        str(len(patterns)),
        Cell(placed, _PLACED.get(placed, "")),
        ", ".join(map(str, first.axes)),
        _eps(first),
        "" if first.affine in ("", "none") else first.affine.replace(" and ", ", "),
        human(sum(p.bytes for p in patterns), "B"),
        human(sum(p.flop for p in patterns)),
    )


def _eps(pattern: Pattern) -> str:
    """eps, and where it stands if that is not under the root."""
    if pattern.eps is None:
        return ""
    elsewhere = pattern.eps and pattern.eps_place not in ("", "inside")
    return f"{pattern.eps:g} {pattern.eps_place}" if elsewhere else f"{pattern.eps:g}"


def _totals(patterns: Sequence[Pattern]) -> list[str]:
    moved, computed = sum(p.bytes for p in patterns), sum(p.flop for p in patterns)
    return ["total", str(len(patterns)), "", "", "", "", human(moved, "B"), human(computed)]


def _where(sites: Sequence[str]) -> str:
    """`h.{0-11}.{ln_1, ln_2}`, and the source lines."""
    names = collapsed(dict.fromkeys(s.partition(" (")[0] for s in sites))
    lines = list(dict.fromkeys(s.partition(" (")[2].rstrip(")") for s in sites if " (" in s))
    text = ", ".join(names[:_SITES_SHOWN])
    if len(names) > _SITES_SHOWN:
        text += f" and {len(names) - _SITES_SHOWN} more"
    source = ", ".join(lines[:_SITES_SHOWN]) + (", ..." if len(lines) > _SITES_SHOWN else "")
    return f"{text}  {source}" if source else text


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
