"""The report as one HTML page without any other file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfuse.report.report import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top; }
th { border-bottom: 2px solid #c8d0dc; } tr:nth-child(even) td { background: #f5f7fa; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.ok { color: #13733a; } .bad { color: #b3202a; font-weight: bold; } code { font-size: .85rem; }
.bar { background: #4a7bd0; height: .8rem; display: inline-block; border-radius: 2px; }
details { margin: .4rem 0; }
"""


def to_html(report: Report) -> str:
    """The whole page."""
    verdict = report.verification
    parts = [f"<h1>normfuse: {escape(report.model)}</h1>"]
    if verdict is not None:
        parts.append(f'<p class="{"ok" if verdict else "bad"}">{escape(str(verdict))}</p>')
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    parts += [_passes(report), _refusals(report), _rewrites(report), _weights(report), _seconds(report)]
    title = escape(report.model)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>normfuse: {title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _table(title: str, head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(_cell(item) for item in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{cells}</tr>{body}</table>"


def _cell(item: object) -> str:
    return f'<td class="number">{item}</td>' if isinstance(item, int | float) else f"<td>{escape(str(item))}</td>"


def _passes(report: Report) -> str:
    rows: list[tuple[object, ...]] = [(name, count) for name, count in report.fired.items()]
    return _table("Rewrites", ("pass", "fired"), rows)


def _refusals(report: Report) -> str:
    rows: list[tuple[object, ...]] = [
        (name, len(sites), reason, ", ".join(sites[:4])) for (name, reason), sites in report.refused().items()
    ]
    rows += [(r.pass_name, 1, f"rolled back: {r.reason}", r.site) for r in report.rolled_back]
    return _table("Left alone", ("pass", "sites", "reason", "where"), rows)


def _rewrites(report: Report) -> str:
    rows: list[tuple[object, ...]] = [(r.pass_name, r.site, r.exactness, r.before, r.after) for r in report.rewrites]
    table = _table("Where", ("pass", "site", "exactness", "before", "after"), rows)
    return f"<details><summary>{len(rows)} rewrites, one by one</summary>{table}</details>" if rows else ""


def _weights(report: Report) -> str:
    rows: list[tuple[object, ...]] = [(name, str(program).partition(" = ")[2]) for name, program in report.weights.items()]
    table = _table("New weights", ("name", "program over original weights"), rows)
    return f"<details><summary>{len(rows)} new weights and how they came about</summary>{table}</details>" if rows else ""


def _seconds(report: Report) -> str:
    longest = max(report.seconds.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{value:.3f}</td>'
        f'<td><span class="bar" style="width:{100 * value / longest:.1f}%">&nbsp;</span></td></tr>'
        for name, value in report.seconds.items()
    )
    return f"<h2>Seconds</h2><table>{rows}</table>" if rows else ""
