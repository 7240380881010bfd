"""The rest of the family of known functions: softmax and its logarithms over rows, and functions of one element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.recognise.rows.rows import Rows, all_finite
from normfuse.recognise.rows.standardize import Factor, Standardisation

_EXACT = 1e-12
"""Two spellings of an activation differ by a few roundings of float64, gelu's two approximations by 1e-4."""
_SATURATED = 50.0
_PROBE = 0.1

ACTIVATIONS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("gelu", "none", F.gelu),
    ("gelu", "tanh", lambda x: F.gelu(x, approximate="tanh")),
    ("silu", "", F.silu),
)


@dataclass(frozen=True)
class Softmax:
    """softmax(scale * x) over the rows, or its logarithm, or log-sum-exp along `axis`."""

    kind: str
    rows: Rows | None
    scale: float = 1.0
    axis: int = -1
    keepdim: bool = False


@dataclass(frozen=True)
class Activation:
    """gelu(x) or silu(x)."""

    kind: str
    variant: str


@dataclass(frozen=True)
class Squashed:
    """gain * tanh(alpha * x) + shift, or gain * erf(alpha * x + offset) + shift."""

    kind: str
    alpha: Factor
    offset: Factor | None
    gain: Factor
    shift: Factor | None


def identify_softmax(draws: Standardisation, root: fx.Node, rows: Rows) -> Softmax | None:
    pairs = _pairs(draws, root)
    if pairs is None:
        return None
    xs, ys = [rows.rows(x) for x, _, _ in pairs], [rows.rows(y) for _, y, _ in pairs]
    if all(bool((y > 0).all()) for y in ys):
        scale = _slope(xs[0], ys[0].log())
        if scale and all(_close(y, torch.softmax(scale * x, -1)) for x, y in zip(xs, ys, strict=True)):
            return Softmax("softmax", rows, scale)
    if all(bool((y < 0).all()) for y in ys):
        scale = _slope(xs[0], ys[0])
        if scale and all(_close(y, torch.log_softmax(scale * x, -1)) for x, y in zip(xs, ys, strict=True)):
            return Softmax("log_softmax", rows, scale)
    return None


def _pairs(draws: Standardisation, root: fx.Node) -> list[tuple[Tensor, Tensor, list[Any]]] | None:
    """Rows, results and sides, if every one of the results has numbers."""
    pairs = draws.moderate_pairs(root)
    found = [(x, y, sides) for x, y, sides in pairs if y is not None and all_finite(y)]
    return found if len(found) == len(pairs) else None


def identify_logsumexp(draws: Standardisation, root: fx.Node) -> Softmax | None:
    """A result that has lost one axis."""
    shape = tuple(draws.experiment.shape)
    pairs = _pairs(draws, root)
    if pairs is None:
        return None
    for axis in range(len(shape)):
        for keepdim in (True, False):
            wanted = [(torch.logsumexp(x, axis, keepdim), y) for x, y, _ in pairs]
            if shape[axis] > 1 and all(w.shape == y.shape and _close(y, w) for w, y in wanted):
                return Softmax("logsumexp", None, axis=axis - len(shape), keepdim=keepdim)
    return None


def _slope(x: Tensor, y: Tensor) -> float:
    """The one number a with y = a * x + (a number for each row), or 0."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    total = float(dx.square().sum())
    scale = float((dx * dy).sum()) / total if total > 0 else 0.0
    if not math.isfinite(scale) or float((dy - scale * dx).abs().amax()) > 1e-8 * (1 + float(dy.abs().amax())):
        return 0.0
    return 1.0 if abs(scale - 1) < 1e-9 else scale


def _close(y: Tensor, wanted: Tensor) -> bool:
    return all_finite(y) and float((y - wanted).abs().amax()) <= _EXACT * float(wanted.abs().amax())


def identify_pointwise(draws: Standardisation, root: fx.Node) -> Activation | Squashed | None:
    """A result each of whose elements depends on one element of the source."""
    pairs = _pairs(draws, root)
    if pairs is None:
        return None
    for kind, variant, function in ACTIVATIONS:
        if all(_close(y, function(x)) for x, y, _ in pairs):
            return Activation(kind, variant)
    return _squashed(draws, root)


def _at(draws: Standardisation, root: fx.Node, x: float) -> Tensor | None:
    if ("at", x) not in draws.kept:
        draws.kept["at", x] = draws.experiment.run(torch.full(draws.experiment.shape, x, dtype=torch.float64))
    value = draws.kept["at", x].get(root)
    return value if isinstance(value, Tensor) else None


def _squashed(draws: Standardisation, root: fx.Node) -> Squashed | None:
    points = [_at(draws, root, x) for x in (-_SATURATED, 0.0, _PROBE, _SATURATED)]
    if any(p is None or not all_finite(p) for p in points):
        return None
    low, zero, near, high = (p for p in points if p is not None)
    gain, shift = (high - low) / 2, (high + low) / 2
    if float(gain.abs().amin()) < 1e-9:
        return None
    at_zero, at_near = (zero - shift) / gain, (near - shift) / gain
    for kind, inverse in (("dyt", torch.atanh), ("derf", torch.erfinv)):
        offset = inverse(at_zero)
        alpha = (inverse(at_near) - offset) / _PROBE
        found = _with_factors(draws, kind, alpha, offset, gain, shift)
        if found is not None and _confirmed(draws, root, found):
            return found
    return None


def _with_factors(
    draws: Standardisation, kind: str, alpha: Tensor, offset: Tensor, gain: Tensor, shift: Tensor
) -> Squashed | None:
    if not all_finite(alpha, offset) or float((alpha - alpha.mean()).abs().amax()) > 1e-8 * float(alpha.abs().amax()):
        return None
    tiny = 1e-12 * float(gain.abs().amax())
    has_offset, has_shift = float(offset.abs().amax()) > 1e-12, float(shift.abs().amax()) > tiny
    if has_offset and kind == "dyt":
        return None
    for sign in (1.0, -1.0):
        scale = draws.factor(sign * alpha.mean().reshape(1))
        moved = draws.factor(sign * offset.mean().reshape(1)) if has_offset else None
        gains, shifts = draws.factor(sign * gain), draws.factor(shift) if has_shift else None
        if scale is None or scale.side is None or gains is None:
            continue
        complete = (moved is not None or not has_offset) and (shifts is not None or not has_shift)
        if complete and (shifts is None or shifts.side is not None):
            return Squashed(kind, scale, moved, gains, shifts)
    return None


def _confirmed(draws: Standardisation, root: fx.Node, found: Squashed) -> bool:
    function = torch.tanh if found.kind == "dyt" else torch.erf
    shape = tuple(draws.experiment.shape)

    def of(factor: Factor | None, sides: list[Any]) -> Tensor | float:
        return 0.0 if factor is None else factor.of(sides, shape)

    for x, y, sides in _pairs(draws, root) or []:
        inner = of(found.alpha, sides) * x + of(found.offset, sides)
        wanted = of(found.gain, sides) * function(inner) + of(found.shift, sides)
        if float((y - wanted).abs().amax()) > 1e-8 * float(wanted.abs().amax()):
            return False
    return True
