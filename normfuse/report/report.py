"""The report of one optimization."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normfuse.bake import WeightProgram
from normfuse.errors import NormfuseError
from normfuse.files import write_beside
from normfuse.rewrite.record import Refusal, RewriteRecord
from normfuse.verification.numerics import Verification


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

    def save(self, path: str | Path) -> None:
        """Write `x.json` or `x.html`. Raises `NormfuseError` for another ending or a place that cannot be written."""
        target = Path(path)
        if target.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2, default=str)
        elif target.suffix in (".html", ".htm"):
            from normfuse.report.html import to_html

            text = to_html(self)
        else:
            raise NormfuseError(f"cannot save a report as {target.name!r}: end the name in .json or .html")
        with write_beside(target, NormfuseError) as beside:
            beside.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        from normfuse.report.terminal import render

        return render(self)


def count_raised(records: list[RewriteRecord]) -> dict[str, int]:
    return dict(Counter(record.after for record in records))
