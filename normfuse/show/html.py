"""A page as one HTML file without any other."""

from __future__ import annotations

from html import escape

from normfuse.show.page import Column, Item, Line, Page, Section, cell

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top; }
th { border-bottom: 2px solid #c8d0dc; } tr:nth-child(even) td { background: #f5f7fa; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: #13733a; } .bad { color: #b3202a; font-weight: bold; } .dim { color: #5d6778; } .strong { font-weight: bold; }
.bar { background: #4a7bd0; height: .8rem; display: inline-block; border-radius: 2px; }
details { margin: .4rem 0; }
"""


def to_html(page: Page) -> str:
    """The whole page."""
    title = escape(page.title)
    parts = [f"<h1>{title}</h1>", *(_line(part) if isinstance(part, Line) else _section(part) for part in page.parts)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _line(line: Line) -> str:
    return f'<p class="{line.tone}">{escape(line.text)}</p>' if line.tone else f"<p>{escape(line.text)}</p>"


def _section(section: Section) -> str:
    if not section.rows:
        return ""
    heads = "".join(f"<th{_class(column.align)}>{escape(column.title)}</th>" for column in section.columns)
    body = "".join("<tr>" + "".join(map(_cell, row, section.columns)) + "</tr>" for row in section.rows)
    table = f"<h2>{escape(section.title)}</h2><table><tr>{heads}</tr>{body}</table>"
    return f"<details><summary>{escape(section.summary)}</summary>{table}</details>" if section.summary else table


def _cell(item: Item, column: Column) -> str:
    known = cell(item)
    bar = "" if known.share is None else f'<span class="bar" style="width:{100 * known.share:.1f}%">&nbsp;</span>'
    tone = "" if column.align == "right" else known.tone or column.tone
    return f"<td{_class(column.align, tone)}>{escape(known.text)}{bar}</td>"


def _class(*names: str) -> str:
    given = " ".join(name for name in names if name and name != "left")
    return f' class="{given}"' if given else ""
