"""Is it gain * f(x) + shift, with the reference of a record for f? Any norm, found by evaluation of its own definition.

The gain and the shift are solved for on rows so large that eps vanishes (or, where rows are not scale-free, on ordinary
ones), eps on rows so small that it is all there is; then the whole is compared on rows of ordinary size, on rows of every
size between, and at zero: wherever a floor, another place of eps or another power would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ops import Operator, operators
from normfuse.recognise.rows.rows import Rows, all_finite
from normfuse.recognise.rows.standardize import MATCH, Factor, Standardisation, linear_fit

_SCALES = [10.0**power for power in range(-15, 3)]
_LEAST, _MOST = 1e-60, 1e6
_HALVINGS = 80
_ROWS = 4


@dataclass(frozen=True)
class Known:
    """gain * f(x) + shift over `rows`, where f is the function of `record` with this `eps`."""

    record: Operator
    rows: Rows
    eps: float
    gain: Factor
    shift: Factor | None
    place: str = "inside"

    @property
    def kind(self) -> str:
        return self.record.stem


def identify_by_reference(draws: Standardisation, root: fx.Node, rows: Rows) -> Known | None:
    """The first record whose function `root` is over `rows`."""
    return next((found for record in _candidates() if (found := _Trial(record, draws, root, rows).found())), None)


def _candidates() -> Iterator[Operator]:
    return (record for record in operators() if record.alone and record.by_reference)


class _Trial:
    """One record against one result of a region."""

    def __init__(self, record: Operator, draws: Standardisation, root: fx.Node, rows: Rows) -> None:
        self.record, self.draws, self.root, self.rows = record, draws, root, rows

    def found(self) -> Known | None:
        solved = self._factors()
        if solved is None:
            return None
        gain, shift = solved
        factor, added = self.draws.factor(self.rows.back(gain)), None
        if bool((shift != 0).any()):
            added = self.draws.factor(self.rows.back(shift))
            if added is None or added.side is None:
                return None
        muted = None if added is None else added.side
        eps = self._eps(gain, muted) if factor is not None else None
        if factor is None or eps is None or not self._confirmed(gain, shift, muted, eps):
            return None
        return Known(self.record, self.rows, eps, factor, added)

    def _f(self, x: Tensor, eps: float) -> Tensor:
        """The function of rows, without gain and shift."""
        assert self.record.reference is not None
        told = {self.record.eps: eps} if self.record.eps else {}
        return self.record.reference(x, [-1], **told)

    def _value(self, values: dict[fx.Node, Any]) -> Tensor | None:
        value = values.get(self.root)
        fits = isinstance(value, Tensor) and tuple(value.shape) == self.rows.shape
        return self.rows.rows(value) if fits else None  # type: ignore[arg-type]

    def _factors(self) -> tuple[Tensor, Tensor] | None:
        """Gain and shift of every element; one and zero where the operator has none."""
        far = self.record.homogeneous
        xs = self.draws.large if far else self.draws.moderate
        ys = [self._value(v) for v in (self.draws.large_values if far else self.draws.moderate_values)]
        if any(y is None or not all_finite(y) for y in ys):
            return None
        if self.record.gain is None:
            return torch.ones_like(ys[0]), torch.zeros_like(ys[0])  # type: ignore[arg-type]
        return linear_fit(torch.stack([self._f(self.rows.rows(x), 0.0) for x in xs]), torch.stack(ys))  # type: ignore[arg-type]

    def _eps(self, gain: Tensor, muted: int | None) -> float | None:
        """The eps with which tiny rows come out as they do; the function falls where eps grows."""
        if self.record.eps is None:
            return 0.0
        y = self._value(self.draws.run(self.draws.tiny, muted, "tiny"))
        if y is None or not all_finite(y):
            return None
        x, y, gain = (t[:_ROWS] for t in (self.rows.rows(self.draws.tiny), y, gain))
        wanted = float((y / gain).abs().median())

        def size(eps: float) -> float:
            return float(self._f(x, eps).abs().median())

        if abs(size(0.0) - wanted) <= 1e-6 * wanted:
            return 0.0
        return _solved(size, wanted)

    def _confirmed(self, gain: Tensor, shift: Tensor, muted: int | None, eps: float) -> bool:
        whole = zip(self.draws.moderate, self.draws.moderate_values, strict=True)
        if not all(self._equal(x, values, gain, shift, eps) for x, values in whole):
            return False
        nothing = torch.zeros_like(shift)
        return all(
            self._equal(scale * (x := self.draws.moderate[0]), self.draws.run(scale * x, muted, scale), gain, nothing, eps)
            for scale in (*_SCALES, 0.0)
        )

    def _equal(self, x: Tensor, values: dict[fx.Node, Any], gain: Tensor, shift: Tensor, eps: float) -> bool:
        """Where the model overflows and has no number, it cannot be asked for the same one."""
        y, wanted = self._value(values), gain * self._f(self.rows.rows(x), eps) + shift
        if y is None:
            return False
        there = torch.isfinite(y)
        off, size = (t[there].abs().amax() if bool(there.any()) else t.new_zeros(()) for t in (y - wanted, wanted))
        return float(off) <= MATCH * float(size)  # false also where the reference has no number


def _solved(size: Callable[[float], float], wanted: float) -> float | None:
    """By halving on a logarithmic scale."""
    low, high = math.log(_LEAST), math.log(_MOST)
    if not size(_LEAST) > wanted > size(_MOST):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(math.exp(middle)) > wanted else (low, middle)
    return math.exp((low + high) / 2)


__all__ = ["Known", "identify_by_reference"]
