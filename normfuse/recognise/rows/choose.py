"""From a finding to a canonical operator: which kind, over which axes, with which eps, what of the affine part goes in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from normfuse.graph.node import shape
from normfuse.ops import operator_named
from normfuse.recognise.rows.by_reference import Known
from normfuse.recognise.rows.regions import Region
from normfuse.recognise.rows.rows import Rows
from normfuse.recognise.rows.standardize import Factor, Standardised

_CLOSE = 1e-9
"""A factor fitted to 1e-11 against the root of a whole number: the roots of neighbours differ by more, up to 10^8."""


@dataclass(frozen=True)
class Plan:
    """A norm to be put in: `target` is the stem of its record; a factor that the operator cannot take stands in `times`
    and `plus` behind it."""

    kind: str
    target: str
    rows: Rows
    eps: float
    place: str = "inside"
    ddof: int = 0
    channel: int = 1
    constant: float = 1.0
    weight: Factor | None = None
    bias: Factor | None = None
    times: Factor | None = None
    plus: Factor | None = None
    parts: tuple[int, int] | None = None

    def agrees(self, other: Plan) -> bool:
        """The same operator, found at other sizes."""
        facts = ("kind", "target", "place", "ddof", "channel", "axes")
        if any(getattr(self, f) != getattr(other, f) for f in facts) or self.rows.split != other.rows.split:
            return False
        numbers = [(self.eps, other.eps), (self.constant, other.constant)]
        for name in ("weight", "bias", "times", "plus"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                return False
            if mine is not None:
                if mine.side != theirs.side or mine.axes != theirs.axes:
                    return False
                numbers += [(mine.scale, theirs.scale), (mine.offset, theirs.offset)]
        return all(abs(a - b) <= 1e-9 * max(abs(a), abs(b)) for a, b in numbers)

    def with_parts_of(self, other: Plan) -> Plan:
        """Which stays when the split axis grows: the number of parts, or their length?"""
        split = self.rows.split
        if split is None:
            return self
        if self.rows.parts == other.rows.parts:
            return replace(self, parts=(self.rows.parts, -1))
        same = self.rows.length == other.rows.length
        return replace(self, parts=(-1, self.rows.length)) if same else replace(self, target="none")

    @property
    def axes(self) -> tuple[int, ...]:
        """Negative; where rows hold a part of an axis, those of the tensor with that axis in two."""
        rank, split = len(self.rows.shape), self.rows.split
        if split is None:
            return tuple(a - rank for a in self.rows.axes)
        inner = sorted([split + 1, *(a + (a > split) for a in self.rows.axes)])
        return tuple(a - rank - 1 for a in inner)


def plan_of(found: Standardised | Known, region: Region, root: fx.Node) -> Plan | str:
    """The canonical operator for a finding, or why there is none."""
    if found.rows.split is None and not found.rows.axes:
        return "it normalises nothing"
    if _over_batch(found.rows, region.source):
        return "its statistics are taken over the batch"
    if isinstance(found, Known):
        constant, weight = _gain(found.gain, 1.0)
        return _place_affine(found.kind, found, as_written(found.eps, literals(region)), 0, constant, weight, region)
    n = found.rows.size
    form, divisor = divisor_of(found.form, abs(found.gain.scale), n, region, root)
    if form is None:
        return "its scale is that of no known norm"
    written = literals(region)
    if form == "rms_norm" and found.place == "clamp" and _is_among(found.root0, written):
        form, divisor = "l2_norm", 1
    unit = math.sqrt(divisor)
    constant, weight = _gain(found.gain, unit)
    found, eps = eps_of(found, divisor, written)
    ddof = 1 if abs(divisor - (n - 1)) < 0.5 and form in ("layer_norm", "rms_norm") and divisor != n else 0
    return _place_affine(form, found, eps, ddof, constant, weight, region)


def _over_batch(rows: Rows, source: fx.Node) -> bool:
    if 0 not in rows.axes and rows.split != 0:
        return False
    several = len(rows.axes) + (rows.split is not None) > 1
    first = shape(source)[0]
    return not isinstance(first, int) or (several and len(rows.shape) >= 3)


def divisor_of(form: str, scale: float, n: int, region: Region, root: fx.Node) -> tuple[str | None, float]:
    """The kind, and the m of sum / m that the scale of the result shows."""

    def near(m: float) -> bool:
        return abs(scale - math.sqrt(m)) < _CLOSE * scale

    if form == "compressed":
        return ("crms_norm", n + 1.0) if near(n + 1) else (None, 1)
    if form == "centred":
        if near(n):
            return "layer_norm", n
        if near(n - 1) and n > 2:
            return "layer_norm", n - 1
        return (None, 1) if near(1) else ("layer_norm", n)
    if near(n):
        return "rms_norm", n
    if near(1):
        return "l2_norm", 1
    if near(n - 1):
        return "rms_norm", n - 1
    return ("rms_norm", n) if _takes_means(region, root) else ("l2_norm", 1)


def _takes_means(region: Region, root: fx.Node) -> bool:
    return any("mean" in str(n.target) or "pool" in str(n.target) for n in region.inside(root))


def _gain(gain: Factor, unit: float) -> tuple[float, Factor | None]:
    """(constant, side): the gain in units of the norm's own scale."""
    scale, offset = snapped(gain.scale / unit), snapped(gain.offset / unit)
    if gain.side is None:
        return scale, None
    return 1.0, Factor(gain.side, scale, offset, gain.axes)


def snapped(number: float) -> float:
    """A number that differs from a short one by rounding alone is the short one."""
    if number == 0:
        return 0.0
    for digits in (1, 2, 3, 4, 6, 9):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= 1e-11 * abs(number):
            return short
    return number


def eps_of(found: Standardised, divisor: float, written: list[float]) -> tuple[Standardised, float]:
    """eps in the terms of the operator: as it is written in the graph, where it is."""
    if found.root0 == 0:
        return found, 0.0
    square = found.root0**2 / divisor
    raw = square if found.place == "inside" else math.sqrt(square)
    if found.place == "clamp" and not _is_among(raw, written) and _is_among(square, written):
        found, raw = replace(found, place="floor"), square
    return found, as_written(raw, written)


def as_written(number: float, written: list[float]) -> float:
    """The number as it stands in the graph, where it does."""
    return next((w for w in written if abs(w - number) < 1e-11 * w), None) or snapped(number)


def _is_among(number: float, written: list[float]) -> bool:
    return any(abs(w - number) < 1e-11 * w for w in written)


def literals(region: Region) -> list[float]:
    return [abs(n) for node in region.nodes for n in _numbers((node.args, dict(node.kwargs))) if n]


def _numbers(item: Any) -> list[float]:
    if isinstance(item, bool):
        return []
    if isinstance(item, int | float):
        return [item] if math.isfinite(item) else []
    if isinstance(item, tuple | list):
        return [n for i in item for n in _numbers(i)]
    if isinstance(item, dict):
        return [n for i in item.values() for n in _numbers(i)]
    return []


def _place_affine(
    form: str, found: Standardised | Known, eps: float, ddof: int, constant: float, weight: Factor | None, region: Region
) -> Plan:
    rows, rank = found.rows, len(found.rows.shape)
    plain = form == "layer_norm" and ddof == 0 and (found.place == "inside" or eps == 0)
    channel = _channel(rows, weight, found.shift)
    kind, target = form, {"layer_norm": "standardize", "rms_norm": "standardize"}.get(form, form)
    if form == "layer_norm" and rows.split is not None:
        kind, target = "group_norm", "group_norm" if plain else "none"
    elif form == "layer_norm" and _is_instance(rows, channel, rank) and not _along_rows(rows, weight, found.shift):
        kind, target = "instance_norm", "instance_norm" if plain else "standardize"
    elif plain and channel == 1 and rows.axes == tuple(range(1, rank)) and rank > 2:
        kind, target = "group_norm", "group_norm"
    elif plain and _is_trailing(rows, region.source):
        target = "layer_norm"
    elif form == "rms_norm" and ddof == 0 and found.place == "inside":
        target = "rms_norm"
    if target in ("group_norm", "instance_norm"):
        inside = {rows.split if rows.split is not None else (channel if channel is not None else 1)}
    else:
        inside = set(rows.axes)
    takes = target != "none" and operator_named(target).gain is not None and (rows.split is None or target == "group_norm")
    fits = takes and constant == 1.0 and weight is not None and set(weight.axes) <= inside and bool(weight.axes)
    shift_fits = takes and found.shift is not None and set(found.shift.axes) <= inside and bool(found.shift.axes)
    shift_fits = shift_fits and (weight is None or fits) and constant == 1.0
    return Plan(
        kind, target, rows, eps, found.place, ddof,
        channel=next(iter(inside)) if target in ("group_norm", "instance_norm") else 1,
        constant=constant,
        weight=weight if fits else None,
        bias=found.shift if shift_fits else None,
        times=None if fits else weight,
        plus=None if shift_fits else found.shift,
    )  # fmt: skip


def _channel(rows: Rows, weight: Factor | None, shift: Factor | None) -> int | None:
    """The one axis along which the affine part varies."""
    axes = {a for f in (weight, shift) if f is not None for a in f.axes}
    return axes.pop() if len(axes) == 1 else None


def _along_rows(rows: Rows, weight: Factor | None, shift: Factor | None) -> bool:
    """A gain that differs from place to place within a row is a LayerNorm's."""
    axes = {a for f in (weight, shift) if f is not None for a in f.axes}
    return bool(axes) and axes <= set(rows.axes)


def _is_instance(rows: Rows, channel: int | None, rank: int) -> bool:
    """Over all axes behind batch and channel. On three axes only a gain for each channel tells it from a LayerNorm."""
    if rank < 3 or rows.axes != tuple(range(2, rank)):
        return False
    return channel == 1 or (rank > 3 and len(rows.axes) > 1 and channel is None)


def _is_trailing(rows: Rows, source: fx.Node) -> bool:
    rank = len(rows.shape)
    trailing = rows.axes == tuple(range(rank - len(rows.axes), rank))
    return trailing and all(isinstance(s, int) for s in shape(source)[rank - len(rows.axes) :])
