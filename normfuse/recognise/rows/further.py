"""Functions that have a name and no operator of ours: the inventory names them, no pass rewrites them.

Sparsemax and its relatives, softmax with more in its denominator, DyISRU and EvoNorm are told by evaluation; AdaLIN and
region norm, which are made of norms, by how these are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.evaluate.sizes import Concrete, Impossible
from normfuse.graph.node import aten, is_op, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Role, Roles
from normfuse.recognise.rows.composed import composed_kind
from normfuse.recognise.rows.experiment import Experiment, numel
from normfuse.recognise.rows.regions import WIDE, Region, region_from, sources_of
from normfuse.recognise.rows.rows import Rows, all_finite, changed_rows

KINDS = (
    "dyisru", "evo_norm", "sparsemax", "entmax", "stablemax", "softmax_with_sink", "softmax_off_by_one", "adalin",
    "region_norm",
)  # fmt: skip
_SEEDS = (
    aten.sort, aten.topk, aten.cumsum, aten.sum, aten.logsumexp, aten.rsqrt, aten.sqrt, aten.pow, aten.hypot, aten.var,
    aten.std, aten.var_mean, aten.std_mean,
)  # fmt: skip
_FAR = 80
_MOST_REGIONS = 120
_MOST_ELEMENTS = 1 << 16
_CLOSE = 1e-9
_COARSE = 1e-6
"""Bisection stops when it is near enough; two of these functions differ by far more on some row."""


@dataclass(frozen=True)
class Named:
    """`node` computes a `kind`, of which `inside` are the steps."""

    kind: str
    node: fx.Node
    inside: frozenset[fx.Node]


def named_functions(program: Program) -> Iterator[Named]:
    """What has a name in a raised program, in graph order."""
    roles = Roles(program)
    search = _Search(roles, (Concrete(program, roles), Concrete(program, roles, small=False)))
    for node in program.graph.nodes:
        if node in search.explained or node.op != "call_function" or roles(node) is not Role.ACTIVATION:
            continue
        if (kind := composed_kind(node)) is not None:
            yield Named(kind, node, frozenset((node,)))
            continue
        found = search.at(node) if _is_seed(node) else None
        if found is not None:
            search.explained |= found.inside
            yield found


def _is_seed(node: fx.Node) -> bool:
    return is_op(node, *_SEEDS) or (is_op(node, aten.softmax) and _is_of_more(node))


def _is_of_more(softmax: fx.Node) -> bool:
    """Are scores of something else put beside those that it is taken of?"""
    behind = softmax.all_input_nodes
    for _ in range(3):
        if any(is_op(n, aten.cat, aten.pad, aten.constant_pad_nd) for n in behind):
            return True
        behind = [i for n in behind for i in n.all_input_nodes]
    return False


# -- by evaluation ------------------------------------------------------------------------------------------------


class _Search:
    """Regions that were looked at, and what they were."""

    def __init__(self, roles: Roles, concretes: tuple[Concrete, Concrete]) -> None:
        self.roles = roles
        self.concretes = concretes
        self.explained: set[fx.Node] = set()
        self._known: dict[object, tuple[str, int] | None] = {}

    def at(self, seed: fx.Node) -> Named | None:
        for source in reversed(sources_of(seed, self.roles, WIDE, _FAR)):  # of nearer ones a part may be a constant
            if len(self._known) >= _MOST_REGIONS:
                return None
            region = region_from(source, self.roles, self.concretes[0].describe, _FAR, WIDE)
            if region.key not in self._known:
                self._known[region.key] = self._evaluate(region)
            found = self._known[region.key]
            if found is not None and seed in (inside := region.inside(root := region.nodes[found[1]])):
                return Named(found[0], root, frozenset(inside))
        return None

    def _evaluate(self, region: Region) -> tuple[str, int] | None:
        """The kind and the place of the last result that is one."""
        for concrete in self.concretes:
            try:
                if 4 <= numel(concrete.shape(region.source)) <= _MOST_ELEMENTS:
                    return _told(region, Experiment(region, concrete, 13))
            except (Impossible, RuntimeError):
                continue
        return None


def _told(region: Region, experiment: Experiment) -> tuple[str, int] | None:
    for signed in (True, False):
        if not signed:
            experiment.positive_sides()
        trial = _Trial(experiment)
        for place in range(len(region.nodes) - 1, -1, -1):
            root = region.nodes[place]
            v = value(root)
            fits = isinstance(v, Tensor) and v.is_floating_point() and str(shape(root)) == str(shape(region.source))
            if fits and (kind := trial.kind(root)) is not None:
                return kind, place
    return None


class _Trial:
    """The values of one region's results at a few inputs."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.xs = [experiment.draw(1.0), experiment.draw(1.5)]
        self.values = [experiment.run(x) for x in self.xs]
        near = experiment.draw(0.05)  # so near to each other that each has a share in what a row gives
        self.before = experiment.run(near)
        changed = near.clone()
        self.place = changed.numel() // 3
        changed.view(-1)[self.place] += 0.02
        self.changed = experiment.run(changed)
        self.at_numbers: dict[float, dict[fx.Node, Tensor]] = {}

    def is_finite(self, root: fx.Node) -> bool:
        values = [v.get(root) for v in (*self.values, self.before, self.changed)]
        return all(isinstance(v, Tensor) and v.is_floating_point() and all_finite(v) for v in values)

    def kind(self, root: fx.Node) -> str | None:
        if not self.is_finite(root) or tuple(self.values[0][root].shape) != self.experiment.shape:
            return None
        ys = [v[root] for v in self.values]
        rows = changed_rows(self.before[root], self.changed[root], self.place)
        alone = rows is not None and rows.size == 1
        if alone and self._is_isru(root):
            return "dyisru"
        found = None if rows is None or alone or rows.split is not None else self._of_rows(root, rows, ys)
        return found or ("evo_norm" if self._is_evo(ys) else None)

    def _of_rows(self, root: fx.Node, rows: Rows, ys: list[Tensor]) -> str | None:
        pairs = [(rows.rows(x), rows.rows(y)) for x, y in zip(self.xs, ys, strict=True)]
        if any(bool((y < 0).any()) for _, y in pairs):
            return None
        for kind, function, tolerance in _SIMPLICES:
            if all(_near(y, function(x), tolerance) for x, y in pairs):
                return kind
        return "entmax" if _is_entmax(pairs) else self._beside(root, rows, pairs)

    def _beside(self, root: fx.Node, rows: Rows, pairs: list[tuple[Tensor, Tensor]]) -> str | None:
        """exp(x) / (c + sum exp(x)), c the same for every x."""
        found = [_denominator(x, y) for x, y in pairs]
        first, second = found
        if first is None or second is None or not _near(first, second, 1e-7) or float(first.amin()) < 1e-6:
            return None
        if _near(first, torch.ones_like(first), 1e-7):
            return "softmax_off_by_one"
        again = self.experiment.run(self.xs[0], self.experiment.other_sides()).get(root)
        other = None if again is None else _denominator(pairs[0][0], rows.rows(again))
        return None if other is None or _near(first, other, _COARSE) else "softmax_with_sink"

    def _at(self, root: fx.Node, number: float) -> Tensor | None:
        if number not in self.at_numbers:
            full = torch.full(self.experiment.shape, number, dtype=torch.float64)
            self.at_numbers[number] = self.experiment.run(full)
        return self.at_numbers[number].get(root)

    def _is_isru(self, root: fx.Node) -> bool:
        """gain * x / sqrt(c + x^2) + shift"""
        low, zero, high = (self._at(root, x) for x in (-1e8, 0.0, 1e8))
        if low is None or zero is None or high is None or not all_finite(low, zero, high):
            return False
        gain, shift = (high - low) / 2, (high + low) / 2
        if float(gain.abs().amin()) < _COARSE or not _near(zero, shift, 1e-7):
            return False
        inner: list[Tensor] = []
        for x in (-2.0, -0.7, 0.3, 1.0, 3.0):
            y = self._at(root, x)
            if y is None or not all_finite(y):
                return False
            u = (y - shift) / gain
            inner.append(x * x * (u.square().reciprocal() - 1) if bool((u * x > 0).all()) else torch.full_like(u, -1.0))
        first = inner[0]
        saturates = float(first.amin()) > 0 and float(first.amax()) < 1e8
        return saturates and all(_near(c, first, _COARSE) for c in inner)

    # -- EvoNorm

    def _is_evo(self, ys: list[Tensor]) -> bool:
        sizes = self.experiment.shape
        gated = any(is_op(n, aten.sigmoid, aten.silu, aten.max, aten.maximum) for n in self.experiment.region.nodes)
        if not gated or len(sizes) not in (3, 4, 5) or sizes[1] < 2:
            return False
        sides = [v for v in self.experiment.sides.values() if isinstance(v, Tensor) and v.is_floating_point()]
        found = [v.flatten() for v in sides if v.numel() == sizes[1]]
        one = torch.ones(sizes[1], dtype=torch.float64)
        shifts = [torch.zeros_like(one), *found]
        return any(self._is_sample_based(v, ys, shifts) or self._is_batch_based(v, ys, shifts) for v in (one, *found))

    def _is_sample_based(self, v: Tensor, ys: list[Tensor], shifts: list[Tensor]) -> bool:
        """x * sigmoid(v x) / std of a group of channels: the ratio, times the deviation, is one number per channel."""
        for groups in (g for g in range(1, self.experiment.shape[1] + 1) if self.experiment.shape[1] % g == 0):
            for shift in shifts:
                gains = [
                    (y - _wide(shift, y)) * _deviation(x, groups) / (x * torch.sigmoid(_wide(v, x) * x))
                    for x, y in zip(self.xs, ys, strict=True)
                ]
                if _is_per_channel(gains, 1e-3):  # eps beside a variance of the size of one
                    return True
        return False

    def _is_batch_based(self, v: Tensor, ys: list[Tensor], shifts: list[Tensor]) -> bool:
        """x / max(sqrt(var of the batches + eps), v x + std of the instance)"""
        for shift in shifts:
            above = [x / (y - _wide(shift, y)) for x, y in zip(self.xs, ys, strict=True)]
            inner = [_wide(v, x) * x + _deviation(x, x.shape[1]) for x in self.xs]
            a, b = (torch.stack([t.movedim(1, 0).flatten(1) for t in ts], 1).flatten(1) for ts in (above, inner))
            if all_finite(a, b) and all(_is_floored(p, q) for p, q in zip(a, b, strict=True)):
                return True
        return False


def _is_floored(above: Tensor, inner: Tensor) -> bool:
    """above * gain == max(floor, inner), for one gain and one floor."""
    sign = -1.0 if float(above.sum()) < 0 else 1.0
    above = above * sign
    least = above.amin()
    at_floor = above <= least * (1 + 1e-9)
    if not bool(at_floor.any()) or bool(at_floor.all()) or int(at_floor.sum()) < 2:
        return False
    gains = inner[~at_floor] / above[~at_floor]
    gain = gains.median()
    return bool(((gains - gain).abs() < 1e-3 * gain.abs()).all()) and bool((inner[at_floor] <= gain * least * 1.001).all())


def _wide(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def _deviation(x: Tensor, groups: int) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    return parts.std(-1, correction=0).repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *[1] * (x.dim() - 2))


def _is_per_channel(gains: list[Tensor], tolerance: float) -> bool:
    flat = torch.cat([g.movedim(1, 0).flatten(1) for g in gains], 1)
    middle = flat.median(-1, keepdim=True).values
    return all_finite(flat) and bool(((flat - middle).abs() <= tolerance * middle.abs()).all())


# -- functions of rows whose results add up to one ----------------------------------------------------------------


def _stablemax(x: Tensor) -> Tensor:
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    return s / s.sum(-1, keepdim=True)


def _sparsemax(x: Tensor) -> Tensor:
    z = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    support = (1 + k * z > z.cumsum(-1)).sum(-1, keepdim=True)
    return (x - (z.cumsum(-1).gather(-1, support - 1) - 1) / support).clamp_min(0)


_SIMPLICES: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    ("stablemax", _stablemax, _CLOSE), ("sparsemax", _sparsemax, _COARSE),
)  # fmt: skip


def _is_entmax(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """p^(a-1) - (a-1) x is the same for all that is not zero, and no zero has more."""
    x, p = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    if not bool((p == 0).any()) or not _near(p.sum(-1), torch.ones(len(p), dtype=p.dtype), _COARSE):
        return False

    def off(a: float) -> float:
        threshold = p.pow(a - 1) - (a - 1) * x
        inside = threshold.masked_fill(p == 0, 0).sum(-1, keepdim=True) / (p > 0).sum(-1, keepdim=True)
        within = (threshold - inside).masked_fill(p == 0, 0).abs().amax()
        beyond = (inside - threshold).masked_fill(p > 0, 0).amax()
        return float(torch.maximum(within, beyond.clamp_min(0)))

    best = min((1 + i / 100 for i in range(2, 200)), key=off)
    low, high = best - 0.01, best + 0.01
    for _ in range(60):
        one, two = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, two) if off(one) < off(two) else (one, high)
    return off((low + high) / 2) < 1e-5


def _denominator(x: Tensor, y: Tensor) -> Tensor | None:
    """What stands beside the sum below exp(x), for each row."""
    if not all_finite(y) or not bool((y > 0).all()):
        return None
    k = x.exp() / y
    first = k[:, :1]
    return first - x.exp().sum(-1, keepdim=True) if _near(k, first.expand_as(k), _CLOSE) else None


def _near(y: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return all_finite(y) and float((y - wanted).abs().amax()) <= tolerance * float(wanted.abs().amax())


__all__ = ["KINDS", "Named", "named_functions"]
