"""The report of one optimization."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normfuse.errors import NormfuseError
from normfuse.files import write_beside
from normfuse.rewrite.record import Refusal, RewriteRecord
from normfuse.show.page import Cell, Column, Line, Page, Section
from normfuse.verification.numerics import Verification
from normfuse.weights.program import WeightProgram

_SITES_SHOWN = 2
_STAGES = ("capture", "raise", "passes", "bake", "verify", "lower", "total")


@dataclass
class Report:
    """What `optimize` did. `str(report)` is a table for a terminal; `save` writes JSON or HTML by the file's ending."""

    model: str = ""
    fired: dict[str, int] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    rewrites: list[RewriteRecord] = field(default_factory=list)
    rolled_back: list[Refusal] = field(default_factory=list)
    raised: dict[str, int] = field(default_factory=dict)
    verification: Verification | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    weights: Mapping[str, WeightProgram] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    backend: str = "torch"

    def summary(self) -> str:
        """One line."""
        done = ", ".join(f"{name} {count}" for name, count in self.fired.items()) or "nothing to rewrite"
        return done if self.verification is None else f"{done}; {self.verification}"

    def refused(self) -> dict[tuple[str, str], list[str]]:
        """Sites by (pass, reason): what is alike is told once."""
        groups: dict[tuple[str, str], list[str]] = {}
        for refusal in self.refusals:
            groups.setdefault((refusal.pass_name, refusal.reason), []).append(refusal.site)
        return groups

    def sites(self, pass_name: str) -> list[str]:
        return [record.site for record in self.rewrites if record.pass_name == pass_name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for programs. New weights appear as their programs in text."""
        return {
            "model": self.model,
            "backend": self.backend,
            "fired": self.fired,
            "raised": self.raised,
            "rewrites": [asdict(r) for r in self.rewrites],
            "refusals": [asdict(r) for r in self.refusals],
            "rolled_back": [asdict(r) for r in self.rolled_back],
            "verification": self.verification.to_dict() if self.verification else None,
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
            "weights": {name: str(program) for name, program in self.weights.items()},
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], *, model: str) -> Report:
        """The report that `to_dict` described, without the weight programs; an empty one of `model` for no description."""
        if not saved:
            return cls(model=model)
        told = {name: saved[name] for name in ("model", "backend", "fired", "raised", "seconds", "notes") if name in saved}
        return cls(
            **told,
            rewrites=[RewriteRecord(**r) for r in saved["rewrites"]],
            refusals=[Refusal(**r) for r in saved["refusals"]],
            rolled_back=[Refusal(**r) for r in saved["rolled_back"]],
            verification=Verification(**saved["verification"]) if saved.get("verification") else None,
        )

    def save(self, path: str | Path) -> None:
        """Write `x.json` or `x.html`. Raises `NormfuseError` for another ending or a place that cannot be written."""
        target = Path(path)
        if target.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2, default=str)
        elif target.suffix in (".html", ".htm"):
            from normfuse.show.html import to_html

            text = to_html(self.page())
        else:
            raise NormfuseError(f"cannot save a report as {target.name!r}: end the name in .json or .html")
        with write_beside(target, NormfuseError) as beside:
            beside.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        from normfuse.show.terminal import render

        return render(self.page())

    def page(self) -> Page:
        """The report for the printers in `show`."""
        return page_of(self)


def count_raised(records: list[RewriteRecord]) -> dict[str, int]:
    return dict(Counter(record.after for record in records))


def page_of(report: Report) -> Page:
    """Everything there is to say, the essential first."""
    parts: list[Line | Section] = [_passes(report)]
    if report.refusals:
        parts.append(_refusals(report))
    if report.verification is not None:
        parts.append(Line(str(report.verification), "good" if report.verification else "bad"))
    parts += [Line(f"rolled back: {r.pass_name} at {r.site}: {r.reason}", "bad") for r in report.rolled_back]
    parts += [Line(f"note: {note}", "note") for note in report.notes]
    parts.append(Line("  ".join(f"{s} {report.seconds[s]:.2f} s" for s in _STAGES if s in report.seconds), "dim"))
    return Page(f"normfuse: {report.model}", (*parts, *_details(report)))


def _passes(report: Report) -> Section:
    numbers = (Column(name, "right") for name in ("fired", "refused", "seconds"))
    columns = (Column("pass"), *numbers, Column("at", wraps=True))
    rows: list[tuple[Cell | str, ...]] = []
    for name in dict.fromkeys([*report.fired, *(r.pass_name for r in report.refusals)]):
        refused = sum(1 for r in report.refusals if r.pass_name == name)
        fired, sites = report.fired.get(name, 0), report.sites(name)
        more = f" and {len(sites) - _SITES_SHOWN} more" if len(sites) > _SITES_SHOWN else ""
        seconds = f"{report.seconds.get(name, 0.0):.2f}"
        at = ", ".join(sites[:_SITES_SHOWN]) + more
        rows.append((Cell(name, "good" if fired else "dim"), str(fired), str(refused or ""), seconds, at))
    return Section("", columns, tuple(rows))


def _refusals(report: Report) -> Section:
    columns = (Column("pass", tone="dim"), Column("sites", "right"), Column("reason", wraps=True))
    groups = report.refused().items()
    rows = tuple((name, str(len(sites)), f"{reason} [at {sites[0]}]") for (name, reason), sites in groups)
    return Section("left alone", columns, rows)


def _details(report: Report) -> list[Section]:
    texts = tuple(Column(name) for name in ("pass", "site", "exactness", "before", "after"))
    rewrites = tuple((r.pass_name, r.site, r.exactness, r.before, r.after) for r in report.rewrites)
    weights = tuple((name, str(program).partition(" = ")[2]) for name, program in report.weights.items())
    longest = max(report.seconds.values(), default=0.0) or 1.0
    seconds = tuple((name, f"{took:.3f}", Cell("", share=took / longest)) for name, took in report.seconds.items())
    sections = [
        Section("Where", texts, rewrites, f"{len(rewrites)} rewrites, one by one"),
        Section("New weights", (Column("name"), Column("program over original weights")), weights,
                f"{len(weights)} new weights and how they came about"),
        Section("Seconds", (Column("stage"), Column("seconds", "right"), Column("")), seconds, "how long each stage took"),
    ]  # fmt: skip
    return [section for section in sections if section.rows]
