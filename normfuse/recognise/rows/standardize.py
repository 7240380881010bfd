"""Is it gain * d / root(q(d)) + shift? The family of norms over rows, identified by evaluation.

d is the row, centred or not; q its sum of squares; the root holds eps inside, outside, or as a floor. Nothing is guessed:
the gain and the shift are solved for where the row is so large that eps vanishes, eps where it is so small that eps is
all there is, the form of the root where both are alike; then the whole is compared on rows that took no part in that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.recognise.rows.experiment import Experiment
from normfuse.recognise.rows.rows import Rows, all_finite, reduced, varying_axes

LARGE, TINY = 1e12, 1e-40
"""Sizes of rows at which eps is nothing (1e-24 of the mean square, below float64's rounding) and everything."""

FIT = 1e-8
"""How far a straight line fitted through four draws may be off: its slope divides by a spread that may be small, which
costs half of float64's sixteen digits at worst. What passes is held to `MATCH` once its constants are known."""

MATCH = 1e-11
"""How far the formula may be off the region's values: both are float64 and differ by the rounding of a row's sums, 1e-13;
eps in another place or n - 1 for n shows above 1e-8 at one of the sizes of rows."""


@dataclass(frozen=True)
class Factor:
    """scale * side + offset, where `side` is a side of the region (or none: a number), along `axes` of the source."""

    side: int | None
    scale: float
    offset: float = 0.0
    axes: tuple[int, ...] = ()

    def of(self, sides: list[Any], shape: tuple[int, ...]) -> Tensor:
        """Its values for given sides, broadcast to the source's shape."""
        if self.side is None:
            return torch.full(shape, self.scale, dtype=torch.float64)
        thin = [size if axis in self.axes else 1 for axis, size in enumerate(shape)]
        return (self.scale * sides[self.side] + self.offset).reshape(thin).expand(shape)


@dataclass(frozen=True)
class Standardised:
    """factor * d / root + shift over `rows`; in units of the sum of squares, `root0` is the root's value at zero."""

    form: str  # "centred", "plain", "compressed"
    rows: Rows
    root0: float
    place: str
    gain: Factor
    shift: Factor | None


def numerator(form: str, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if form == "centred" else x


def squares(form: str, x: Tensor) -> Tensor:
    d = numerator(form, x)
    total = d.square().sum(-1, keepdim=True)
    return total + x.sum(-1, keepdim=True).square() if form == "compressed" else total


FORMS = ("centred", "plain", "compressed")
UNSTEADY = "its eps or its scale is no constant: it depends on a weight or on an input"


class Standardisation:
    """The draws of one source, shared by all results that are tried against the family.

    Large and tiny ones are made when they are asked for: what is pointwise needs none.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.moderate = [experiment.draw(1.0), experiment.draw(3.0) + 1.0, experiment.draw(1e-3)]
        self.moderate_values = [experiment.run(x) for x in self.moderate]
        self.kept: dict[object, dict[fx.Node, Tensor]] = {}

    @cached_property
    def _others(self) -> dict[fx.Node, Any]:
        return self.experiment.other_sides()

    def other_sides(self) -> list[Any]:
        """All sides, the free ones drawn once more."""
        return list({**self.experiment.sides, **self._others}.values())

    def among_others(self, root: fx.Node, x: Tensor, key: object) -> Tensor | None:
        """The result where every free side has another value; `key` names x."""
        if ("other", key) not in self.kept:
            self.kept["other", key] = self.experiment.run(x, self._others)
        value = self.kept["other", key].get(root)
        return value if isinstance(value, Tensor) else None

    def moderate_pairs(self, root: fx.Node) -> list[tuple[Tensor, Tensor | None, list[Any]]]:
        """(row, result, sides) for ordinary rows, with the sides as they were drawn and with others.

        A number that was solved for under the first draw and depends on a side does not fit the second.
        """
        mine = list(self.experiment.sides.values())
        first = [(x, v.get(root), mine) for x, v in zip(self.moderate, self.moderate_values, strict=True)]
        if not self.has_free_sides(root):
            return first
        theirs = self.other_sides()
        return first + [(x, self.among_others(root, x, i), theirs) for i, x in enumerate(self.moderate)]

    def has_free_sides(self, root: fx.Node) -> bool:
        read = {n for node in self.experiment.region.inside(root) for n in node.all_input_nodes}
        return any(n in read for n in self.experiment.free())

    @cached_property
    def large(self) -> list[Tensor]:
        return [self.experiment.draw(LARGE) for _ in range(4)]

    @cached_property
    def large_values(self) -> list[dict[fx.Node, Any]]:
        return [self.experiment.run(x) for x in self.large]

    @cached_property
    def tiny(self) -> Tensor:
        return self.experiment.draw(TINY)

    def identify(self, root: fx.Node, rows: Rows) -> Standardised | str:
        """The member of the family that `root` is, or the condition that fails."""
        values = [v.get(root) for v in self.large_values]
        checked = [v.get(root) for v in self.moderate_values]
        if any(not isinstance(v, Tensor) for v in (*values, *checked)):
            return "it cannot be evaluated"
        if not all_finite(*values, *checked[:2]):  # type: ignore[arg-type]
            return "it is not finite on large rows"
        reason = "it is no multiple of the row over the root of its sum of squares"
        if not self._is_bounded(values):  # type: ignore[arg-type]
            return reason
        for form in FORMS:
            fitted = self._fit(form, rows, [rows.rows(v) for v in values])  # type: ignore[arg-type]
            if fitted is None:
                continue
            found = self._complete(form, rows, root, *fitted)
            if isinstance(found, Standardised):
                return found
            reason = found
        return reason

    @staticmethod
    def _is_bounded(values: list[Tensor]) -> bool:
        """A norm of a row of any length is of the size of its gain: the cheapest test, and it settles most."""
        return all(1e-9 < float(v.abs().amax()) < 1e9 for v in values)

    def _fit(self, form: str, rows: Rows, values: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Gain and shift of every element, if the results are a linear function of the scale-free core."""
        return linear_fit(torch.stack([_core(form, rows.rows(x)) for x in self.large]), torch.stack(values))

    def _complete(self, form: str, rows: Rows, root: fx.Node, gain: Tensor, shift: Tensor) -> Standardised | str:
        gains, shifts = rows.back(gain), rows.back(shift)
        factor = self.factor(gains)
        if factor is None:
            return "the gain is not one of the weights"
        added = None
        if bool((shift != 0).any()):
            added = self.factor(shifts)
            if added is None or added.side is None:
                return "the shift is not one of the weights"
        muted = None if added is None else added.side
        at_zero = self._root_at_zero(form, rows, root, gain, muted)
        if isinstance(at_zero, str):
            return at_zero
        place = self._place(form, rows, root, gain, muted, at_zero)
        if place is None:
            return "eps stands neither inside nor outside the root, nor as its floor"
        found = Standardised(form, rows, at_zero, place, factor, added)
        if not self._confirmed(found, root, gains, shifts):
            return "it differs on rows of ordinary size"
        return found if self._is_steady(found, root) else UNSTEADY

    # -- gains

    def factor(self, values: Tensor) -> Factor | None:
        """The values as a number, or as a multiple of (or one plus) one of the free or fixed sides."""
        axes = varying_axes(values)
        if axes is None:
            return None
        small = reduced(values, axes).flatten()
        candidates = [
            (i, v.flatten()) for i, v in enumerate(self.experiment.sides.values())
            if isinstance(v, Tensor) and v.numel() == small.numel() and v.is_floating_point()
        ]  # fmt: skip
        if small.numel() == 1:
            number = float(small[0])
            free = set(self.experiment.free())
            nodes = list(self.experiment.sides)
            for i, v in candidates:
                if nodes[i] in free and (ratio := _nice_ratio(number, float(v[0]), self._natural())) is not None:
                    return Factor(i, ratio)
            return Factor(None, number)
        for i, v in candidates:
            fitted = _linear(v, small)
            if fitted is not None:
                return Factor(i, *fitted, axes)
        return None

    def _natural(self) -> tuple[float, ...]:
        sizes = {self.experiment.shape[-1], *self.experiment.shape}
        total = math.prod(self.experiment.shape)
        return tuple(f for n in sizes | {total} for f in (math.sqrt(n), math.sqrt(max(n - 1, 1))))

    # -- eps

    def run(self, x: Tensor, muted: int | None, key: object) -> dict[fx.Node, Tensor]:
        """Run with the side of the shift at zero: beside it, what a tiny row gives would be lost."""
        if (muted, key) not in self.kept:
            sides = {}
            if muted is not None:
                node = list(self.experiment.sides)[muted]
                sides = {node: torch.zeros_like(self.experiment.sides[node])}
            self.kept[muted, key] = self.experiment.run(x, sides)
        return self.kept[muted, key]

    def _root_at_zero(self, form: str, rows: Rows, root: fx.Node, gain: Tensor, muted: int | None) -> float | str:
        value = self.run(self.tiny, muted, "tiny").get(root)
        x = rows.rows(self.tiny)
        if not isinstance(value, Tensor) or not all_finite(value):
            return "it is not finite on tiny rows"
        y = rows.rows(value)
        d = numerator(form, x)
        known = d.abs() > 1e-3 * d.abs().amax()
        roots = (gain * d / y)[known]
        if not all_finite(roots):
            return "it vanishes on tiny rows"
        middle = float(roots.median())
        if middle < 0:
            return "its root is negative"
        scale = float(squares(form, x).amax().sqrt())
        if middle < 1e3 * scale:  # as small as the rows themselves: no eps
            free = (d / squares(form, x).sqrt() * gain)[known]
            return 0.0 if bool(((y[known] - free).abs() < 1e-6 * free.abs()).all()) else "its root is not that of the row"
        if float((roots - middle).abs().amax()) > 1e-7 * middle:
            return "eps differs from row to row"
        return middle

    def _place(
        self, form: str, rows: Rows, root: fx.Node, gain: Tensor, muted: int | None, root0: float
    ) -> str | None:
        if root0 == 0.0:
            return "inside"
        allowed = {"inside", "outside", "clamp"}
        for ratio in (0.5, 2.0):
            x = rows.rows(self.moderate[0])
            x = x * (root0 * ratio / squares(form, x).sqrt())
            value = self.run(rows.back(x), muted, (f"{root0 * ratio:.9e}", form, rows)).get(root)
            if not isinstance(value, Tensor) or not all_finite(value):
                return None
            y = rows.rows(value)
            for place in list(allowed):
                want = gain * numerator(form, x) / root_of(place, root0 * ratio, root0)
                if float((y - want).abs().amax()) > 1e-7 * float(want.abs().amax()):
                    allowed.discard(place)
        return allowed.pop() if len(allowed) == 1 else None

    def _confirmed(self, found: Standardised, root: fx.Node, gains: Tensor, shifts: Tensor) -> bool:
        for x, values in zip(self.moderate, self.moderate_values, strict=True):
            y = found.rows.rows(values[root])
            r = found.rows.rows(x)
            root_value = _roots(found, squares(found.form, r).sqrt())
            want = found.rows.rows(gains) * numerator(found.form, r) / root_value + found.rows.rows(shifts)
            if not all_finite(y) or float((y - want).abs().amax()) > MATCH * float(want.abs().amax()):
                return False
        return True

    def _is_steady(self, found: Standardised, root: fx.Node) -> bool:
        """Does it hold for other values of the sides, with the same numbers? Also where eps is all there is."""
        if not self.has_free_sides(root):
            return True
        shape, sides = self.experiment.shape, self.other_sides()
        gain = found.rows.rows(found.gain.of(sides, shape))
        shift = 0.0 if found.shift is None else found.rows.rows(found.shift.of(sides, shape))
        rows: list[tuple[Tensor, object, float]] = [(x, i, 10 * MATCH) for i, x in enumerate(self.moderate)]
        if found.root0 > 0:
            r = found.rows.rows(self.moderate[0])
            x = found.rows.back(r * (found.root0 / squares(found.form, r).sqrt()))
            rows.append((x, (f"{found.root0:.9e}", found.form, found.rows), 1e-7))
        for x, key, tolerance in rows:
            y = self.among_others(root, x, key)
            if y is None or tuple(y.shape) != shape or not all_finite(y):
                return False
            r = found.rows.rows(x)
            want = gain * numerator(found.form, r) / _roots(found, squares(found.form, r).sqrt()) + shift
            if float((found.rows.rows(y) - want).abs().amax()) > tolerance * float(want.abs().amax()):
                return False
        return True


def linear_fit(core: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gain and shift of every element, over draws, if there are such that y is gain * core + shift."""
    centre, middle = core.mean(0), y.mean(0)
    spread = (core - centre).square().sum(0)
    gain = ((core - centre) * (y - middle)).sum(0) / spread
    shift = middle - gain * centre
    off = (y - gain * core - shift).abs().amax()
    if not all_finite(gain, shift) or float(off) > FIT * float(y.abs().amax()):
        return None
    return gain, torch.where(shift.abs() < 1e-9 * float(y.abs().amax()), 0.0, shift)


def root_of(place: str, length: float, root0: float) -> float:
    """The root where the length of the row and the root at zero are given."""
    if place == "inside":
        return math.hypot(length, root0)
    return length + root0 if place == "outside" else max(length, root0)


def _roots(found: Standardised, lengths: Tensor) -> Tensor:
    if found.place == "inside":
        return torch.sqrt(lengths.square() + found.root0**2)
    return lengths + found.root0 if found.place == "outside" else lengths.clamp_min(found.root0)


def _core(form: str, x: Tensor) -> Tensor:
    return numerator(form, x) / squares(form, x).sqrt()


def _nice_ratio(number: float, side: float, natural: tuple[float, ...]) -> float | None:
    """number / side, if it is so simple that this is no accident."""
    if side == 0 or number == 0:
        return None
    ratio = number / side
    for unit in (1.0, *natural):
        for simple in (1.0, 0.5, 2.0, -1.0):
            if abs(ratio - simple * unit) < 1e-9 * abs(simple * unit):
                return simple * unit
    return None


def _linear(v: Tensor, wanted: Tensor) -> tuple[float, float] | None:
    """(a, b) with a * v + b == wanted, b zero where it can be."""
    dot = float((v * v).sum())
    if dot > 0:
        a = float((v * wanted).sum()) / dot
        if float((a * v - wanted).abs().amax()) <= MATCH * float(wanted.abs().amax()):
            return (round(a) if abs(a - round(a)) < 1e-11 else a), 0.0
    centred = v - v.mean()
    spread = float(centred.square().sum())
    if spread <= 1e-12 * max(dot, 1e-300):
        return None
    a = float((centred * wanted).sum()) / spread
    b = float(wanted.mean()) - a * float(v.mean())
    good = float((a * v + b - wanted).abs().amax()) <= MATCH * float(wanted.abs().amax())
    return (a, b) if good else None
