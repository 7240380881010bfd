"""Affine maps of one tensor: what any tree of convolutions, linears, frozen norms, scales, pools and sums computes.

`Affine(program)(node)` follows a node up through such operators and tells it as a sum of terms, each an affine map of
one source that moves along the spatial axes as a convolution does. Two terms of one source are one map. Nothing is
computed here: a map carries the recipe from which `rewrite.kernels` builds its kernel and its bias.

A tensor with several readers, or a nonlinearity, ends the way up: it is a source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from normfuse.analysis.channelwise import acts_on, as_large, channelwise_operand
from normfuse.analysis.grouped import Groups, groups_of, unflattened
from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.windows import Window, Windows, common, per_axis, windows_of
from normfuse.graph.node import argument, arguments, aten, is_op, rank, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class Identity:
    """The source itself (with zeros around it where the windows say so)."""


@dataclass(frozen=True)
class Own:
    """A projection or an embedding with its own weights."""

    node: fx.Node
    projection: Projection | None


@dataclass(frozen=True)
class Pool:
    """An average pool: a depthwise kernel of equal taps."""

    node: fx.Node
    divisor: int


@dataclass(frozen=True)
class Gathered:
    """Sums of groups of channels: a matrix of ones and zeros, times a number."""

    groups: Groups


@dataclass(frozen=True)
class Channelwise:
    """A scale, a shift, a frozen BatchNorm or a cast on top of another map."""

    node: fx.Node
    operand: fx.Node
    inner: AffineMap


@dataclass(frozen=True)
class Composed:
    """`outer` applied to the result of `inner`."""

    outer: AffineMap
    inner: AffineMap


@dataclass(frozen=True)
class Sum:
    """Several maps of one source, each with a factor."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class AffineMap:
    """y = K * source + b. `groups` is 0 for a diagonal map (one factor per channel); `axis` None: any axis will do."""

    source: fx.Node
    recipe: Identity | Own | Pool | Gathered | Channelwise | Composed | Sum
    node: fx.Node | None = None
    axis: int | None = None
    windows: Windows = ()
    groups: int = 0
    inputs: int = 0
    outputs: int = 0
    shifted: bool = False
    merged: bool = False
    covers: frozenset[fx.Node] = frozenset()

    @property
    def diagonal(self) -> bool:
        return self.groups == 0

    @property
    def table(self) -> bool:
        """Is this an embedding: a linear map of one-hot vectors?"""
        v = value(self.source)
        return isinstance(v, Tensor) and not v.is_floating_point()


@dataclass(frozen=True)
class Term:
    """A map with a factor, as one summand."""

    map: AffineMap
    factor: float = 1.0

    def times(self, factor: float) -> Term:
        return Term(self.map, self.factor * factor)


@dataclass
class Affine:
    """The analysis. `sequential=False` keeps projections in a row apart; `dense=False` knows diagonal maps alone."""

    program: Program
    sequential: bool = True
    dense: bool = True
    why_not: dict[fx.Node, str] = field(default_factory=dict)
    """Why summands of one source could not be joined, by the node that adds them."""

    def __post_init__(self) -> None:
        self.weights = constants(self.program)
        self._known: dict[fx.Node, tuple[Term, ...]] = {}

    def __call__(self, node: fx.Node) -> tuple[Term, ...]:
        """The summands of `node`; a node that is no affine map of anything is its own source."""
        if node not in self._known:
            self._known[node] = self._describe(node) or (Term(identity(node)),)
        return self._known[node]

    def map(self, node: fx.Node) -> AffineMap:
        """The node as one map; its own source if it has several."""
        terms = self(node)
        return terms[0].map if len(terms) == 1 and terms[0].factor == 1 else identity(node)

    def _below(self, operand: fx.Node, reader: fx.Node) -> tuple[Term, ...]:
        alone = set(operand.users) == {reader}
        return self(operand) if alone else (Term(identity(operand)),)

    def _inner(self, operand: fx.Node, reader: fx.Node) -> AffineMap:
        terms = self._below(operand, reader)
        if len(terms) != 1:
            return identity(operand)
        term = terms[0]
        return term.map if term.factor == 1 else total([term], None, operand)  # type: ignore[return-value]

    def _describe(self, node: fx.Node) -> tuple[Term, ...] | None:
        v = value(node)
        if node.op != "call_function" or node in self.weights or not isinstance(v, Tensor) or not v.is_floating_point():
            return None
        if is_op(node, aten.add, aten.sub, aten.rsub) and (terms := self._sum(node)) is not None:
            return terms
        found = self._dense(node) if self.dense else None
        found = found or self._channelwise(node)
        return None if found is None else (Term(found),)

    # -- sums

    def _sum(self, node: fx.Node) -> tuple[Term, ...] | None:
        given = arguments(node)
        left, right = given["self"], given["other"]
        operands = [(left, 1.0), (right, float(given.get("alpha", 1)))]
        if is_op(node, aten.sub):
            operands[1] = (right, -operands[1][1])
        elif is_op(node, aten.rsub):
            operands[0] = (left, -operands[1][1])
            operands[1] = (right, 1.0)
        if any(not isinstance(x, fx.Node) or x in self.weights or not as_large(x, node) for x, _ in operands):
            return None
        terms: list[Term] = []
        for operand, factor in operands:
            for term in self._below(operand, node):
                self._add(terms, term.times(factor), node)
        # A sum that stays a sum is still one tensor to whoever reads it.
        return tuple(terms)

    def _add(self, terms: list[Term], term: Term, node: fx.Node) -> None:
        for place, other in enumerate(terms):
            if other.map.source is not term.map.source:
                continue
            joined = total([other, term], node, node)
            if isinstance(joined, AffineMap):
                terms[place] = Term(joined)
                return
            self.why_not[node] = joined
        terms.append(term)

    def extended(self, m: AffineMap) -> AffineMap:
        """The map from an earlier source, if nobody but the map itself reads the one that it has."""
        below = self.map(m.source)
        if not set(m.source.users) <= m.covers or isinstance(below.recipe, Identity):
            return m
        return compose(m, below, m.node) or m

    # -- single operators

    def _dense(self, node: fx.Node) -> AffineMap | None:
        return self._projection(node) or self._flat(node) or self._gathered(node) or self._pool(node) or self._pad(node)

    def _flat(self, node: fx.Node) -> AffineMap | None:
        """A linear of flattened tokens, its result unflattened: a linear of the tokens."""
        inner = node.args[0] if node.args else None
        own = self.own(inner) if isinstance(inner, fx.Node) else None
        if own is None or own.table or own.windows or (x := unflattened(node, inner, own.source)) is None:  # type: ignore[arg-type]
            return None
        flat = frozenset((own.source,)) if len(own.source.users) == 1 else frozenset[fx.Node]()
        whole = replace(own, source=x, node=node, axis=rank(node) - 1, covers=own.covers | {node} | flat)
        return compose(whole, self._inner(x, own.source), node) or whole

    def _gathered(self, node: fx.Node) -> AffineMap | None:
        found = groups_of(node, self.weights)
        if found is None:
            return None
        own = AffineMap(
            found.source, Gathered(found), node, rank(node) - 1, (), 1, found.count * found.each, found.count,
            covers=found.covers,
        )  # fmt: skip
        return compose(own, self._inner(own.source, min(found.covers)), node) or own

    def _projection(self, node: fx.Node) -> AffineMap | None:
        own = self.own(node)
        if own is None or own.table:
            return own
        inner = self._inner(own.source, node)
        if not self.sequential and not inner.diagonal:
            return own
        return compose(own, inner, node) or own

    def own(self, node: fx.Node) -> AffineMap | None:
        """A projection or an embedding alone, as a map of its own input."""
        if is_op(node, aten.embedding) and argument(node, "weight") in self.weights:
            size, width = (int(s) for s in shape(argument(node, "weight")))
            last = rank(node) - 1
            return AffineMap(
                argument(node, "indices"), Own(node, None), node, last, (), 1, size, width, covers=frozenset((node,))
            )
        found = projection(node, None, self.weights)
        if found is None or is_a(node, Trait.TRANSPOSED):
            return None
        source: fx.Node = argument(node, found.input_name)
        sizes = shape(found.weight)
        spatial = len(sizes) - 2 if is_a(node, Trait.CONVOLUTION) else 0
        whole = rank(source) == spatial + 2 if spatial else rank(source) >= 2 and len(sizes) == 2
        windows = windows_of(node, sizes[2:]) if spatial else ()
        if not whole or windows is None or not all(isinstance(s, int) for s in sizes):
            return None
        inputs, outputs = int(sizes[found.in_axis]) * found.groups, int(sizes[found.out_axis])
        axis = 1 if spatial else rank(node) - 1
        return AffineMap(
            source, Own(node, found), node, axis, windows, found.groups, inputs, outputs,
            shifted=found.bias is not None, covers=frozenset((node,)),
        )  # fmt: skip

    def _pool(self, node: fx.Node) -> AffineMap | None:
        spatial = next((i + 1 for i, op in enumerate(_POOLS) if is_op(node, op)), 0)
        if not spatial or rank(node) != spatial + 2 or not isinstance(channels := shape(node)[1], int):
            return None
        a = arguments(node)
        sizes, padding = per_axis(a["kernel_size"], spatial), per_axis(a["padding"], spatial)
        strides = per_axis(a["stride"], spatial) if a["stride"] else sizes
        if a["ceil_mode"] or (any(padding) and not a["count_include_pad"]):
            return None
        windows = tuple(Window(k, s, 1, p, p) for k, s, p in zip(sizes, strides, padding, strict=True))
        divisor = a.get("divisor_override") or math.prod(sizes)
        own = AffineMap(
            a["self"], Pool(node, divisor), node, 1, windows, channels, channels, channels, covers=frozenset((node,))
        )
        return compose(own, self._inner(own.source, node), node) or own

    def _pad(self, node: fx.Node) -> AffineMap | None:
        if not is_op(node, aten.pad, aten.constant_pad_nd) or argument(node, "value") not in (None, 0, 0.0):
            return None
        pads, spatial = argument(node, "pad"), rank(node) - 2
        plain = all(isinstance(p, int) and p >= 0 for p in pads) and argument(node, "pad") is not None
        if arguments(node).get("mode", "constant") != "constant" or not plain or spatial < 1 or len(pads) > 2 * spatial:
            return None
        pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)] + [(0, 0)] * (spatial - len(pads) // 2)
        windows = tuple(Window(low=low, high=high) for low, high in reversed(pairs))
        own = AffineMap(node.args[0], Identity(), node, 1, windows, covers=frozenset((node,)))  # type: ignore[arg-type]
        return compose(own, self._inner(own.source, node), node) or own

    def _channelwise(self, node: fx.Node) -> AffineMap | None:
        source = channelwise_operand(node, self.weights)
        if source is None:
            return None
        axis, shifted = acts_on(node, source, self.weights)
        inner = self._inner(source, node)
        if axis is not None and inner.axis is not None and axis != inner.axis:
            inner = identity(source)
        if any(w.padded for w in inner.windows) and inner.diagonal and shifted:
            inner = identity(source)
        return replace(
            inner, recipe=Channelwise(node, source, inner), node=node, axis=inner.axis if axis is None else axis,
            shifted=inner.shifted or shifted, covers=inner.covers | {node},
        )  # fmt: skip


_POOLS = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)


# -- algebra of maps ---------------------------------------------------------------------------------------------------


def identity(node: fx.Node) -> AffineMap:
    return AffineMap(node, Identity(), node)


def compose(outer: AffineMap, inner: AffineMap, node: fx.Node | None) -> AffineMap | None:
    """`outer` of `inner` as one map, if it is one at the border too; None otherwise.

    Zeros that the outer map puts around the inner result must be what the inner map gives for zeros: the inner map is
    pointwise and adds nothing, or the outer one pads nothing.
    """
    if isinstance(inner.recipe, Identity) and not inner.windows:
        return replace(outer, source=inner.source, node=node)
    if None not in (outer.axis, inner.axis) and outer.axis != inner.axis:
        return None
    windows = _composed_windows(outer.windows, inner.windows, inner.shifted)
    if windows is None:
        return None
    one_sided = outer.diagonal or inner.diagonal
    groups = inner.groups or outer.groups if one_sided else math.gcd(outer.groups, inner.groups)
    return AffineMap(
        inner.source, Composed(outer, inner), node, inner.axis if outer.axis is None else outer.axis, windows, groups,
        inner.inputs or outer.inputs, outer.outputs or inner.outputs, outer.shifted or inner.shifted,
        inner.merged or outer.merged, outer.covers | inner.covers,
    )  # fmt: skip


def _composed_windows(outer: Windows, inner: Windows, shifted: bool) -> Windows | None:
    n = max(len(outer), len(inner))
    outer, inner = outer or (Window(),) * n, inner or (Window(),) * n
    if len(outer) != len(inner) or (shifted and any(w.padded for w in outer)):
        return None
    if all(w.pointwise for w in inner):
        return tuple(o.padded_by(i) for o, i in zip(outer, inner, strict=True))
    if all(w.size == 1 and not w.padded for w in outer):
        return tuple(replace(i, stride=i.stride * o.stride) for o, i in zip(outer, inner, strict=True))
    return None


def total(terms: Sequence[Term], node: fx.Node | None, like: fx.Node) -> AffineMap | str:
    """The sum of maps of one source, whose result looks like `like`; or why it is not one map."""
    maps = [t.map for t in terms]
    axes = {m.axis for m in maps if m.axis is not None}
    if len(axes) > 1:
        return "the branches have their channels along different axes"
    dense = [m for m in maps if not m.diagonal]
    windows = frame(maps, like)
    if isinstance(windows, str):
        return windows
    channels = dense[0].inputs if dense else 0
    groups = 0
    for m in maps:
        groups = math.gcd(groups, m.groups or channels)
    covers = frozenset[fx.Node]().union(*(m.covers for m in maps)) | ({node} if node is not None else frozenset())
    return AffineMap(
        maps[0].source, Sum(tuple(terms)), node, next(iter(axes), None), windows, groups, channels,
        dense[0].outputs if dense else 0, any(m.shifted for m in maps), len(maps) > 1 or any(m.merged for m in maps),
        covers,
    )  # fmt: skip


def frame(maps: Sequence[AffineMap], like: fx.Node) -> Windows | str:
    """The windows into which the kernels of all these maps fit."""
    n = max(len(m.windows) for m in maps)
    if any(not m.diagonal and len(m.windows) != n for m in maps):
        return "a branch is a convolution and another is not"
    given, wanted = shape(maps[0].source)[-n:], shape(like)[-n:]
    found: list[Window] = []
    for place in range(n):
        window = common([m.windows[place] if m.windows else Window() for m in maps], given[place], wanted[place])
        if isinstance(window, str):
            return window
        found.append(window)
    return tuple(found)
