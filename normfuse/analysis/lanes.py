"""Numbers per channel on their way through operators: the table of METHODS 0 for scales and shifts, in both directions.

A *lane* says where such numbers lie in a tensor: along one axis, each once, or repeated by a reshape, cut by a slice, put
beside the channels of others by a concatenation. A scale passes every operator that is linear in this tensor alone and
treats each channel by itself; a shift passes those of which every number is a weighted mean of numbers of one channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from normfuse.analysis.axes import carried_operands, carried_to
from normfuse.graph.node import (
    argument,
    arguments,
    aten,
    is_getitem,
    is_op,
    positive_axis,
    product,
    rank,
    readers,
    same_size,
    shape,
    value,
)
from normfuse.graph.roles import is_view
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class Fill:
    """One number, `count` times."""

    count: int


@dataclass(frozen=True)
class Repeat:
    """Each number `inner` times in a row (None: as often as the weight behind has inputs), all of that `outer` times."""

    outer: int
    inner: int | None


@dataclass(frozen=True)
class Part:
    """The numbers from `start` to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Among:
    """The numbers among other channels, which stay as they are."""

    before: int
    behind: int


Step = Fill | Repeat | Part | Among


@dataclass(frozen=True)
class Lane:
    """The numbers, after these steps, along `axis`; None: one number for all of the tensor."""

    axis: int | None
    steps: tuple[Step, ...] = ()

    def to(self, axis: int, *steps: Step) -> Lane:
        return Lane(axis, (*self.steps, *steps))

    @property
    def is_open(self) -> bool:
        """Is it not known how often each number is repeated?"""
        return any(isinstance(step, Repeat) and step.inner is None for step in self.steps)


@dataclass(frozen=True)
class Piece:
    """`node` is what stands at `start` to `stop` of an axis."""

    node: fx.Node
    start: int
    stop: int


Placed = list[tuple[fx.Node, Lane]]

_MEANS = (
    aten.mean, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, aten.upsample_nearest2d,
    aten.upsample_bilinear2d, aten.upsample_bicubic2d,
)  # fmt: skip
_MOVES = (
    aten.contiguous, aten.clone, aten.roll, aten.flip, aten.split_with_sizes, aten.repeat, aten.repeat_interleave,
    aten.index, aten.index_select, aten.cat, aten.concat, aten.stack,
)  # fmt: skip
_POOLS = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
_MAXIMA: dict[Any, int] = {aten.max_pool1d: 1, aten.max_pool2d: 2, aten.max_pool3d: 3}


def keeps_constants(node: fx.Node) -> bool:
    """Is every number of the result a weighted mean of numbers of one channel, so that a constant stays what it is?"""
    if is_op(node, *_POOLS):
        given = arguments(node)
        padded = any(given["padding"] if isinstance(given["padding"], list) else [given["padding"]])
        return given.get("divisor_override") is None and (not padded or not given["count_include_pad"])
    if is_op(node, aten.pad):
        return argument(node, "mode") != "constant"
    if is_op(node, aten.dropout, aten.feature_dropout):
        return argument(node, "train") is False
    if is_op(node, aten.to, aten._to_copy):
        return value(node).is_floating_point() and value(node.args[0]).is_floating_point()
    return is_view(node) or is_op(node, *_MEANS, *_MOVES)


def behind_maximum(node: fx.Node, operand: fx.Node, lane: Lane, *, shifted: bool) -> Lane | None:
    """Where the numbers lie behind an operator that is not linear, but that a positive scale (and a shift) passes."""
    if is_op(node, aten.relu, aten.leaky_relu):
        return None if shifted else lane
    if is_op(node, aten.amax, aten.amin):
        return _reduced(node, operand, lane)
    spatial = _MAXIMA.get(getattr(node.target, "overloadpacket", None))
    return lane if spatial is not None and lane.axis in (None, rank(node) - spatial - 1) else None


def _reduced(node: fx.Node, operand: fx.Node, lane: Lane) -> Lane | None:
    dims = argument(node, "dim") or range(rank(operand))
    gone = [positive_axis(d, rank(operand)) for d in ([dims] if isinstance(dims, int) else dims)]
    if lane.axis is None or lane.axis in gone:
        return lane if lane.axis is None else None
    before = 0 if argument(node, "keepdim") else sum(d < lane.axis for d in gone)
    return Lane(lane.axis - before, lane.steps)


def is_product(node: fx.Node) -> bool:
    """Linear in one factor as in the other."""
    return is_op(node, aten.mul) or (is_op(node, aten.div) and arguments(node).get("rounding_mode") is None)


# -- forward -----------------------------------------------------------------------------------------------------------


def behind(user: fx.Node, operand: fx.Node, lane: Lane, *, shifted: bool) -> Placed | None:
    """Where the numbers lie behind `user`, whose other operands are left as they are; None: they do not pass it."""
    axis = lane.axis
    if shifted and not keeps_constants(user):
        return None
    if axis is None:
        return [(user, lane)] if _is_linear_in(user, operand) else None
    if (pieces := pieces_of(user, operand, axis)) is not None:
        parts = [(piece.node, lane.to(axis, Part(piece.start, piece.stop))) for piece in pieces]
        return None if lane.is_open else parts
    if is_op(user, aten.cat, aten.concat) and positive_axis(argument(user, "dim"), rank(user)) == axis:
        among = _place_in(user, operand, axis)
        return None if among is None or lane.is_open else [(user, lane.to(axis, among))]
    target = carried_to(user, operand, axis)
    if target is not None and carried_operands(user, target) == [(operand, axis)]:
        return [(user, Lane(target, lane.steps))]
    if (target := _gated(user, operand, axis)) is not None:
        return [(user, Lane(target, lane.steps))]
    return _flattened(user, operand, lane) if is_a(user, Trait.RESHAPE) else None


def _is_linear_in(user: fx.Node, operand: fx.Node) -> bool:
    """In this operand alone."""
    if is_op(user, aten.cat, aten.concat, aten.stack, aten.add, aten.sub, aten.where):
        return False
    if is_product(user):
        return _is_one_factor(user, operand)
    if keeps_constants(user):
        return True
    axes = range(rank(user))
    return any([n for n, _ in carried_operands(user, axis) or []] == [operand] for axis in axes)


def _is_one_factor(user: fx.Node, operand: fx.Node) -> bool:
    a = arguments(user)
    return (a["self"] is operand) != (a["other"] is operand) and (is_op(user, aten.mul) or a["self"] is operand)


def is_gate(user: fx.Node, operand: fx.Node, lane: Lane) -> bool:
    """Does it multiply the channels by others, each its own?"""
    if lane.axis is None or carried_to(user, operand, lane.axis) is not None:
        return False
    return _gated(user, operand, lane.axis) is not None


def _gated(user: fx.Node, operand: fx.Node, axis: int) -> int | None:
    """u * v, element by element: a scale of u passes, whatever v is."""
    if not is_product(user) or not _is_one_factor(user, operand):
        return None
    target = axis + rank(user) - rank(operand)
    return target if same_size(shape(user)[target], shape(operand)[axis]) else None


def _place_in(node: fx.Node, operand: fx.Node, axis: int) -> Among | None:
    """Between which channels of others a concatenation puts the operand."""
    parts = list(argument(node, "tensors"))
    widths = [shape(part)[axis] for part in parts]
    if parts.count(operand) != 1 or not all(isinstance(width, int) for width in widths):
        return None
    place = parts.index(operand)
    return Among(sum(widths[:place]), sum(widths[place + 1 :]))  # type: ignore[arg-type]


def _flattened(user: fx.Node, operand: fx.Node, lane: Lane) -> Placed | None:
    """(.., C, H, W, ..) -> (.., C H W, ..): an axis that holds this one whole, and others before or behind it."""
    before, after, axis = shape(operand), shape(user), lane.axis
    assert axis is not None
    for place in range(len(after)):
        if (run := _run_of(before, after, place)) is None or not run[0] <= axis < run[1]:
            continue
        outer, inner = product(before[run[0] : axis]), product(before[axis + 1 : run[1]])
        if lane.is_open or not isinstance(outer, int):
            return None
        return [(user, lane.to(place, Repeat(outer, inner if isinstance(inner, int) else None)))]
    return None


def _run_of(sizes: tuple[Any, ...], merged: tuple[Any, ...], place: int) -> tuple[int, int] | None:
    """The neighbouring axes of `sizes` that axis `place` of `merged` is made of."""
    for start in range(len(sizes)):
        if not same_size(product(sizes[:start]), product(merged[:place])):
            continue
        for stop in range(start + 1, len(sizes) + 1):
            if same_size(product(sizes[start:stop]), merged[place]):
                return start, stop
    return None


# -- backward ----------------------------------------------------------------------------------------------------------


def before(node: fx.Node, lane: Lane) -> Placed | None:
    """The operands that must all have these numbers for the result to have them; None: they do not come through here.

    Products, where one operand of several is enough, and sums, where one takes a shift, are the caller's.
    """
    axis = lane.axis
    if axis is None:
        return _all_linear(node, lane)
    if (piece := piece_at(node, axis)) is not None:
        source, start, stop, size = piece
        return None if lane.is_open else [(source, lane.to(axis, Among(start, size - stop)))]
    if is_op(node, aten.cat, aten.concat) and positive_axis(argument(node, "dim"), rank(node)) == axis:
        return _parts(node, lane)
    carried = carried_operands(node, axis)
    if carried is not None:
        return [(operand, Lane(own, lane.steps)) for operand, own in carried]
    return _split_axis(node, lane) if is_a(node, Trait.RESHAPE) else None


def _all_linear(node: fx.Node, lane: Lane) -> Placed | None:
    if is_op(node, aten.add, aten.sub):
        both = [argument(node, "self"), argument(node, "other")]
        return [(x, lane) for x in both] if all(isinstance(x, fx.Node) for x in both) else None
    if is_op(node, aten.cat, aten.concat, aten.stack):
        return [(x, lane) for x in argument(node, "tensors")]
    if is_getitem(node) or keeps_constants(node):
        return [(node.args[0], lane)]  # type: ignore[list-item]
    for axis in range(rank(node)):
        if carried := carried_operands(node, axis):
            return [(operand, lane) for operand, _ in carried]
    return None


def _parts(node: fx.Node, lane: Lane) -> Placed | None:
    assert lane.axis is not None
    found: Placed = []
    start = 0
    for part in argument(node, "tensors"):
        width = shape(part)[lane.axis]
        if not isinstance(width, int) or lane.is_open:
            return None
        found.append((part, lane.to(lane.axis, Part(start, start + width))))
        start += width
    return found


def _split_axis(node: fx.Node, lane: Lane) -> Placed | None:
    """(.., H C, ..) -> (.., H, C, ..): the numbers of one of the two, as often as there are of the other."""
    operand: fx.Node = node.args[0]  # type: ignore[assignment]
    before, after, axis = shape(operand), shape(node), lane.axis
    assert axis is not None
    for place in range(len(before)):
        if (run := _run_of(after, before, place)) is None or not run[0] <= axis < run[1]:
            continue
        outer, inner = product(after[run[0] : axis]), product(after[axis + 1 : run[1]])
        whole = isinstance(outer, int) and isinstance(inner, int) and not lane.is_open
        return [(operand, lane.to(place, Repeat(outer, inner)))] if whole else None
    return None


# -- pieces of an axis -------------------------------------------------------------------------------------------------


def pieces_of(user: fx.Node, operand: fx.Node, axis: int) -> list[Piece] | None:
    """What `user` cuts out of `axis` of `operand`, if it is a slice or a split of it."""
    if is_a(user, Trait.SPLIT) and user.args[0] is operand:
        found = [(n, piece_at(n, axis)) for n in readers(user) if is_getitem(n)]
    elif is_a(user, Trait.SLICE) and user.args[0] is operand:
        found = [(user, piece_at(user, axis))]
    else:
        return None
    pieces = [Piece(node, piece[1], piece[2]) for node, piece in found if piece is not None]
    return pieces if pieces and len(pieces) == len(found) else None




def piece_at(node: fx.Node, axis: int) -> tuple[fx.Node, int, int, int] | None:
    """Of which tensor's `axis` the node is a piece: tensor, start, stop and the size of the whole."""
    split = node.args[0] if is_getitem(node) else node
    if not is_a(split, Trait.SPLIT | Trait.SLICE) or is_getitem(node) != is_a(split, Trait.SPLIT):
        return None
    source: fx.Node = split.args[0]  # type: ignore[assignment,union-attr]
    size, ndim = shape(source)[axis] if axis < rank(source) else None, rank(source)
    if not isinstance(size, int) or positive_axis(argument(split, "dim") or 0, ndim) != axis:  # type: ignore[arg-type]
        return None
    if is_getitem(node):
        widths = [v.shape[axis] for v in value(split)]
        place = int(node.args[1])  # type: ignore[arg-type]
        start, width = sum(widths[:place]), widths[place]
    else:
        a = arguments(node)
        start, width = a["start"] or 0, shape(node)[axis]
        if a.get("step", 1) != 1:
            return None
    if not isinstance(start, int) or not isinstance(width, int):
        return None
    start = max(start + size, 0) if start < 0 else start
    return source, start, start + width, size


__all__ = [
    "Among", "Fill", "Lane", "Part", "Piece", "Placed", "Repeat", "Step", "before", "behind", "behind_maximum", "is_gate",
    "is_product", "keeps_constants", "piece_at", "pieces_of",
]  # fmt: skip
