"""Comparing two functions: relative error in float64, and the error in their own dtype, in units of backward error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

EXACT = 1e-10
"""Limit of the relative error in float64 of an exact rewrite: five digits and more above float64's own rounding (1e-16,
and some 1e-13 where a hundred layers add theirs up), four below the smallest mistake (a scale off by 1e-6) that must be
caught."""

_CHUNK = 1 << 16
"""Elements compared at a time: no float64 copy of a large output comes into being."""

RATIO = 2.0
"""Limit of the error in the model's own dtype, in units.

The unit is the largest of the original's own error, one rounding of its output, and what half a unit in the last place
of every weight does to it. A rewrite adds one rounding of each weight that it makes and sums in another order: two errors
of one unit each at most, and what loses two binary digits is above their sum.
"""


@dataclass(frozen=True)
class Verification:
    """The comparison of a candidate with a reference; its truth value is `equivalent`."""

    equivalent: bool
    error_float64: float
    error_ratio: float
    max_abs_error: float
    trials: int = 0
    reason: str = ""
    limit_float64: float = EXACT
    notes: tuple[str, ...] = ()
    """What the verdict leaves open: inputs that were the same in every trial."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))  # a list where it comes from a file

    def __bool__(self) -> bool:
        return self.equivalent

    @property
    def by_rounding_alone(self) -> bool:
        """Refused for the error in the model's own dtype, while the function is the same in float64?"""
        return not self.equivalent and self.error_float64 < self.limit_float64 and math.isfinite(self.error_ratio)

    def __str__(self) -> str:
        verdict = "equivalent" if self.equivalent else f"NOT equivalent ({self.reason})"
        return (
            f"{verdict}: relative error {self.error_float64:.1e} in float64 (limit {self.limit_float64:.0e}), "
            f"{self.error_ratio:.2f} of what rounding does to the original (limit {RATIO:.0f}), "
            f"largest difference {self.max_abs_error:.1e}, {self.trials} trials" + "".join(f"; {n}" for n in self.notes)
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Mismatch(Exception):
    """Outputs that cannot be compared number by number: other structure, shapes, dtypes, integers, NaN."""


def relative_error(candidate: Sequence[Sequence[Any]], reference: Sequence[Sequence[Any]]) -> list[float]:
    """Per output ‖candidate − reference‖ / ‖reference‖ over all trials together, in float64.

    Raises `Mismatch` if integers or constants differ, or NaN and infinities stand in different places.
    """
    count = len(reference[0]) if reference else 0
    for got in candidate:
        if len(got) != count:
            raise Mismatch(f"{len(got)} outputs instead of {count}")
    return [output_error(candidate, reference, place) for place in range(count)]


def output_error(candidate: Sequence[Sequence[Any]], reference: Sequence[Sequence[Any]], place: int) -> float:
    """`relative_error` of one output."""
    square, norm = 0.0, 0.0
    for got, wanted in zip(candidate, reference, strict=True):
        s, n = _squares(got[place], wanted[place], place)
        square, norm = square + s, norm + n
    return math.sqrt(square / norm) if norm > 0 else math.sqrt(square)


def _squares(got: Any, wanted: Any, place: int) -> tuple[float, float]:
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        if type(got) is not type(wanted) or got != wanted:
            raise Mismatch(f"output {place} is {got!r:.60} instead of {wanted!r:.60}")
        return 0.0, 0.0
    if got.shape != wanted.shape:
        raise Mismatch(f"output {place} has shape {list(got.shape)} instead of {list(wanted.shape)}")
    if not (wanted.is_floating_point() or wanted.is_complex()):
        if got.dtype != wanted.dtype or not torch.equal(got, wanted):
            raise Mismatch(f"output {place} ({wanted.dtype}) is not identical")
        return 0.0, 0.0
    square, norm = 0.0, 0.0
    for a, b in _chunks(got, wanted):
        s, n = _chunk_squares(a, b, place)
        square, norm = square + s, norm + n
    return square, norm


def _chunk_squares(got: Tensor, wanted: Tensor, place: int) -> tuple[float, float]:
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    a, b = got.to(wide), wanted.to(wide)
    finite = torch.isfinite(b)
    if not bool(finite.all()) or not bool(torch.isfinite(a).all()):
        same = torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(torch.isinf(a), torch.isinf(b))
        if not same or not torch.equal(a[torch.isinf(a)], b[torch.isinf(b)]):
            raise Mismatch(f"output {place} has NaN or infinity in other places")
        a, b = a[finite], b[finite]
    return float(torch.linalg.vector_norm(a - b) ** 2), float(torch.linalg.vector_norm(b) ** 2)


def max_abs_error(candidate: Sequence[Sequence[Any]], reference: Sequence[Sequence[Any]]) -> float:
    """Largest absolute difference of two numbers in the same place, of those that are finite."""
    worst = 0.0
    for got, wanted in zip(candidate, reference, strict=True):
        for a, b in zip(got, wanted, strict=True):
            if isinstance(b, Tensor) and b.is_floating_point():
                worst = max(worst, *(_largest(*pair) for pair in _chunks(a, b)), 0.0)
    return worst


def _largest(a: Tensor, b: Tensor) -> float:
    difference = (a - b).abs_()
    finite = difference[torch.isfinite(difference)]
    return float(finite.amax()) if finite.numel() else 0.0


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, b.numel(), _CHUNK):
        yield a[start : start + _CHUNK], b[start : start + _CHUNK]


def rounding(outputs: Sequence[Any]) -> list[float]:
    """One rounding of each output: half a unit in the last place of its dtype.

    Nothing is more exact than a float64 model to measure its own error by: there the limit of exactness stands in.
    """
    return [_rounding(o.dtype) if isinstance(o, Tensor) else 1.0 for o in outputs]


def _rounding(dtype: torch.dtype) -> float:
    if not (dtype.is_floating_point or dtype.is_complex):
        return 1.0
    return max(torch.finfo(dtype).eps / 2, EXACT / RATIO if dtype in (torch.float64, torch.complex128) else 0.0)


def compare(
    *,
    reference64: Sequence[Sequence[Any]],
    error64: float,
    original: Sequence[Sequence[Any]],
    candidate: Sequence[Sequence[Any]],
    limit64: float = EXACT,
    sensitivity: Callable[[], Sequence[float]] | None = None,
) -> Verification:
    """Judge a candidate by its error in float64 and by the outputs of both models in their own dtype, trial by trial.

    `sensitivity` gives what rounding the weights does to each output; it is asked for where the rest of the unit is not
    enough. Numbers must have been compared: two models whose outputs are all NaN, or empty, are not shown to be the same.
    """
    trials = len(reference64)
    try:
        own = relative_error(candidate, reference64)
        theirs = relative_error(original, reference64)
        relative_error(candidate, original)  # dtypes of integers, shapes and NaN against the original itself
    except Mismatch as mismatch:
        return Verification(False, math.inf, math.inf, math.inf, trials, str(mismatch))
    if nothing := nothing_compared(reference64):
        return Verification(False, math.inf, math.inf, math.inf, trials, nothing)
    units = [max(pair) for pair in zip(theirs, rounding(original[0]), strict=True)]
    ratio = _ratio(own, units)
    if ratio > RATIO and error64 < limit64 and sensitivity is not None:
        units = [max(pair) for pair in zip(units, sensitivity(), strict=True)]
        ratio = _ratio(own, units)
    reason = ""
    if not error64 < limit64:
        reason = f"the float64 error {error64:.1e} is above {limit64:.1e}"
    elif not ratio <= RATIO:
        reason = f"the error in the model's own dtype is {ratio:.1f} times the original's"
    return Verification(not reason, error64, ratio, max_abs_error(candidate, original), trials, reason, limit64)


def _ratio(errors: Sequence[float], units: Sequence[float]) -> float:
    return max((error / unit for error, unit in zip(errors, units, strict=True)), default=0.0)


def nothing_compared(reference64: Sequence[Sequence[Any]]) -> str:
    """Why the trials show nothing (else ""): an output without one finite number, or no number at all."""
    total = 0
    for place, outputs in enumerate(zip(*reference64, strict=True)):
        tensors = [o for o in outputs if isinstance(o, Tensor) and o.numel()]
        finite = any(bool(torch.isfinite(part).any()) for o in tensors for part, _ in _chunks(o, o))
        if tensors and not finite:
            return f"nothing was compared: output {place} is NaN or infinite everywhere"
        total += len(tensors)
    return "" if total else "nothing was compared: the outputs are empty"
