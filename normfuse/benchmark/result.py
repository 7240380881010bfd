"""What a benchmark measured: by model, batch and contender; kept as JSON, so that it can go on where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from normfuse.errors import NormfuseError
from normfuse.files import write_beside

Key = tuple[str, int]


@dataclass
class Cell:
    """One contender on one model: what its preparation and each round said, or why it failed."""

    prepared: dict[str, Any] = field(default_factory=dict[str, Any])
    rounds: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    failure: str = ""

    def of(self, key: str) -> float:
        return median(r[key] for r in self.rounds)

    @property
    def milliseconds(self) -> float:
        return self.of("milliseconds")

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a share of their median."""
        times = [r["milliseconds"] for r in self.rounds]
        return (max(times) - min(times)) / self.milliseconds

    @property
    def first_call_seconds(self) -> float:
        """From the model to the first result, nothing cached: told by the preparation or by the first round."""
        return float(self.prepared.get("first_call_seconds", self.rounds[0].get("first_call_seconds", float("nan"))))

    def to_dict(self) -> dict[str, Any]:
        medians = {k: self.of(k) for k in ("milliseconds", "error", "peak_megabytes")} if self.rounds else {}
        return {"failure": self.failure, **medians, "prepared": self.prepared, "rounds": self.rounds}


@dataclass
class Result:
    """All cells of a benchmark, what was measured of each model itself, and on what it was measured."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    cells: dict[Key, dict[str, Cell]] = field(default_factory=dict[Key, dict[str, Cell]])
    facts: dict[Key, dict[str, Any]] = field(default_factory=dict[Key, dict[str, Any]])

    @property
    def ceiling(self) -> float:
        """GFLOP/s of the fastest matrix product that this run saw; not a number before there was one."""
        return max((f["ceiling_gflops"] for f in self.facts.values()), default=float("nan"))

    def best(self, key: Key, *, ours: bool) -> tuple[str, float] | None:
        """The fastest contender that is normfuse's, or the fastest that is not."""
        times = {
            name: cell.milliseconds
            for name, cell in self.cells[key].items()
            if cell.rounds and name.startswith("normfuse") == ours
        }
        return min(times.items(), key=lambda item: item[1]) if times else None

    def ratio(self, key: Key) -> float | None:
        """Best peer's time over the best of normfuse's: above 1 is a gain."""
        ours, peer = self.best(key, ours=True), self.best(key, ours=False)
        return peer[1] / ours[1] if ours and peer else None

    def over(self, key: Key, peer: str) -> float | None:
        """One peer's time over the best of normfuse's."""
        ours, cell = self.best(key, ours=True), self.cells[key].get(peer)
        return cell.milliseconds / ours[1] if ours and cell and cell.rounds else None

    def share(self, key: Key, milliseconds: float) -> float:
        """The part of the matrix ceiling that a call of this length reaches."""
        return float(self.facts[key]["gflop"]) / (milliseconds / 1e3) / self.ceiling

    def geometric_mean(self) -> float | None:
        ratios = [ratio for key in self.cells if (ratio := self.ratio(key))]
        return exp(sum(log(r) for r in ratios) / len(ratios)) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "ceiling_gflops": self.ceiling if self.facts else None,
            "geometric_mean": self.geometric_mean(),
            "models": [
                {
                    "model": model,
                    "batch": batch,
                    "facts": self.facts.get((model, batch), {}),
                    "ratio": self.ratio((model, batch)),
                    "contenders": {name: cell.to_dict() for name, cell in cells.items()},
                }
                for (model, batch), cells in self.cells.items()
            ],
        }

    def save(self, path: Path) -> None:
        with write_beside(path, NormfuseError) as beside:
            beside.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")


def read(path: Path) -> Result:
    """A saved benchmark. Raises `NormfuseError` for a file that is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        result = Result(told["settings"])
        for row in told["models"]:
            key = (row["model"], row["batch"])
            if row["facts"]:
                result.facts[key] = row["facts"]
            result.cells[key] = {
                name: Cell(cell["prepared"], cell["rounds"], cell["failure"]) for name, cell in row["contenders"].items()
            }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NormfuseError(f"{path} is no saved benchmark: {error}") from None
    return result
