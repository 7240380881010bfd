"""Who writes the channels of a tensor: may a scale and a shift of them go into the weights of the writers instead?

The way back leads through operators that let them pass (`lanes`): of a sum every operand takes the scale and one takes the
shift, of a product one factor takes the scale. It ends in weights: of projections, embeddings, norms with a gain, or
parameters themselves. A tensor on the way may be read by nobody off the way, who would see the numbers too; of one that is
cut, others may read the other pieces.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normfuse.analysis.gains import Gain, gain_of
from normfuse.analysis.lanes import (
    Among,
    Fill,
    Lane,
    Placed,
    Step,
    before,
    is_product,
    keeps_constants,
    piece_at,
    pieces_of,
)
from normfuse.analysis.projections import Projection, projection
from normfuse.graph.node import argument, arguments, aten, is_op, op_name, rank, readers, shape, site, value


@dataclass(frozen=True)
class Writing:
    """`node` writes channels along `axis` (None: all numbers alike), to which the numbers go by `steps`; a weight enters
    where `reader` reads it. `shifted`: the shift goes here too."""

    node: fx.Node
    axis: int | None
    steps: tuple[Step, ...]
    shifted: bool
    projection: Projection | None = None
    gain: Gain | None = None
    reader: fx.Node | None = None

    @property
    def channels(self) -> int | None:
        """How many numbers it has room for, if that is one axis."""
        size = None if self.axis is None else shape(self.node)[self.axis]
        return size if isinstance(size, int) else None


@dataclass(frozen=True)
class Blocked:
    """`node` cannot take it; or could, but `reader` reads it too."""

    node: fx.Node
    reader: fx.Node | None = None
    why: str = "has no weights that could take the factor"

    def __str__(self) -> str:
        where = f"{op_name(self.node)} at {site(self.node)}"
        if self.reader is None:
            return f"{where} {self.why}"
        return f"{where} is also read by {op_name(self.reader)} at {site(self.reader)}"


@dataclass(frozen=True)
class Written:
    """All writers of a tensor, each with its part of the numbers."""

    writings: tuple[Writing, ...]

    @property
    def shared(self) -> fx.Node | None:
        """A weight that some other call reads as well."""
        nodes = (w.node for w in self.writings if w.reader is None)
        matrices = (n for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and rank(n) > 1)
        return next((n for n in matrices if len(n.users) > 1), None)


def written(
    tensor: fx.Node, reader: fx.Node, axis: int | None, weights: Set[fx.Node], *, scaled: bool = True, shifted: bool = False
) -> Written | Blocked:
    """What writes `tensor`, of which `reader` alone wants a multiple with numbers along `axis`, moved by a shift."""
    blocked: Blocked | None = None
    for cut in (True, False) if axis is None else (True,):
        walk = _Walk(weights, scaled, cut)
        why = walk.enter(tensor, reader, Lane(axis), shifted) or walk.seen_elsewhere()
        if why is None:
            return Written(tuple(walk.writings))
        blocked = blocked or why
    assert blocked is not None
    return blocked


@dataclass
class _Walk:
    weights: Set[fx.Node]
    scaled: bool
    cut: bool
    """Of a projection that is cut, change the outputs of one piece alone by a scalar."""
    writings: list[Writing] = field(default_factory=list)
    lanes: dict[fx.Node, Lane] = field(default_factory=dict)
    shifts: set[fx.Node] = field(default_factory=set)
    edges: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)

    def attempt(self) -> _Walk:
        return _Walk(
            self.weights, self.scaled, self.cut, list(self.writings), dict(self.lanes), set(self.shifts), set(self.edges)
        )

    def adopt(self, other: _Walk) -> None:
        self.writings, self.lanes, self.shifts, self.edges = other.writings, other.lanes, other.shifts, other.edges

    def enter(self, node: Any, reader: fx.Node, lane: Lane, shifted: bool) -> Blocked | None:
        """`reader` wants the numbers along `lane` of `node`; None if it can have them."""
        if not isinstance(node, fx.Node):
            return Blocked(reader)
        self.edges.add((node, reader))
        if node in self.weights and not value(node).is_floating_point():
            return Blocked(node)
        if node in self.weights:
            self.writings.append(Writing(node, lane.axis, lane.steps, shifted, reader=reader))
            return None
        if node in self.lanes:
            again = self.lanes[node] == lane and not shifted and node not in self.shifts
            return None if again else Blocked(node, why="is read along two ways")
        self.lanes[node] = lane
        if shifted:
            self.shifts.add(node)
        if (writing := self._writing(node, lane, shifted)) is not None:
            self.writings.append(writing)
            return None
        return self._through(node, lane, shifted)

    def _writing(self, node: fx.Node, lane: Lane, shifted: bool) -> Writing | None:
        found = projection(node, None, self.weights)
        if found is not None:
            axis = found.channel_axis % rank(node)
            return Writing(node, axis, lane.steps, shifted, found) if lane.axis in (None, axis) else None
        last = rank(node) - 1
        if is_op(node, aten.embedding) and argument(node, "weight") in self.weights and lane.axis in (None, last):
            return Writing(node, last, lane.steps, shifted)
        gain = gain_of(node)
        if gain is None or gain.weight is None or not gain.is_of(self.weights):
            return None
        fits = lane.axis == gain.axis if lane.axis is not None else not shifted or gain.axis is not None
        return Writing(node, gain.axis, lane.steps, shifted, gain=gain) if fits else None

    def _through(self, node: fx.Node, lane: Lane, shifted: bool) -> Blocked | None:
        if shifted and is_op(node, aten.add, aten.sub):
            return self._sum(node, lane)
        if shifted and not keeps_constants(node):
            return Blocked(node)
        if is_product(node) or is_op(node, aten.matmul, aten.bmm):
            return self._product(node, lane)
        if (piece := self._piece(node, lane)) is not None:
            return self._enter_all([piece], node, shifted)
        operands = before(node, lane)
        return Blocked(node) if operands is None else self._enter_all(operands, node, shifted)

    def _enter_all(self, operands: Placed, node: fx.Node, shifted: bool) -> Blocked | None:
        return next((why for operand, lane in operands if (why := self.enter(operand, node, lane, shifted))), None)

    def _piece(self, node: fx.Node, lane: Lane) -> tuple[fx.Node, Lane] | None:
        """A scalar on one piece of a projection whose other pieces others read: as numbers for its outputs."""
        if lane.axis is not None or not self.cut:
            return None
        for axis in range(rank(node)):
            if (found := piece_at(node, axis)) is None:
                continue
            source, start, stop, size = found
            mine = projection(source, None, self.weights)
            if mine is None or mine.channel_axis % rank(source) != axis:
                return None
            return source, Lane(axis, (Fill(stop - start), Among(start, size - stop)))
        return None

    def _sum(self, node: fx.Node, lane: Lane) -> Blocked | None:
        """One operand, whichever can, takes the shift; the others take the scale."""
        operands = before(node, lane)
        plain = is_op(node, aten.add) and arguments(node).get("alpha", 1) == 1
        given = [argument(node, "self"), argument(node, "other")]
        if given[0] is given[1] or (self.scaled and operands is None):
            return Blocked(node)
        why: Blocked | None = None
        for place in (0, 1) if plain else (0,):
            mine = [x for x in operands or _alone(node, given[place], lane) if x[0] is given[place]]
            others = [x for x in operands or [] if x[0] is not given[place]] if self.scaled else []
            walk = self.attempt()
            failed = walk._enter_all(mine, node, True) or walk._enter_all(others, node, False) if mine else Blocked(node)
            if failed is None:
                self.adopt(walk)
                return None
            why = why or failed
        return why

    def _product(self, node: fx.Node, lane: Lane) -> Blocked | None:
        """One factor, the first that can, takes the scale: weights last."""
        first, second = node.args[:2]
        if first is second:
            return Blocked(node, why="has no factor that could take the factor")
        factors = [x for x in (first, second) if isinstance(x, fx.Node) and not (is_op(node, aten.div) and x is second)]
        why: Blocked | None = None
        for factor in sorted(factors, key=self.weights.__contains__):
            own = _lane_of_factor(node, factor, lane)
            walk = self.attempt()
            failed = Blocked(node) if own is None else walk.enter(factor, node, own, False)
            if failed is None:
                self.adopt(walk)
                return None
            why = why or failed
        return why or Blocked(node, why="has no factor that could take the factor")

    def seen_elsewhere(self) -> Blocked | None:
        """A tensor on the way that is read off the way."""
        for node, lane in self.lanes.items():
            for user in readers(node):
                if (node, user) not in self.edges and not self._reads_other_pieces(node, user, lane):
                    return Blocked(node, user)
            taken = [edge for edge in self.edges if edge[0] is node] if node in self.shifts else []
            if len(taken) > 1:
                return Blocked(node, taken[-1][1])
        return None

    def _reads_other_pieces(self, node: fx.Node, user: fx.Node, lane: Lane) -> bool:
        """Does `user` cut out of `node` what the numbers do not touch?"""
        if lane.axis is None or not lane.steps or not isinstance(among := lane.steps[-1], Among):
            return False
        pieces = pieces_of(user, node, lane.axis)
        stop = int(shape(node)[lane.axis]) - among.behind
        return pieces is not None and all(
            (node, p.node) in self.edges or p.stop <= among.before or p.start >= stop for p in pieces
        )


def _alone(node: fx.Node, operand: object, lane: Lane) -> Placed:
    """A summand that takes a shift, of a sum that is not scaled."""
    if not isinstance(operand, fx.Node) or value(operand) is None:
        return []
    if lane.axis is None:
        return [(operand, lane)]
    own = lane.axis - rank(node) + rank(operand)
    return [(operand, Lane(own, lane.steps))] if own >= 0 and shape(operand)[own] == shape(node)[lane.axis] else []


def _lane_of_factor(node: fx.Node, factor: fx.Node, lane: Lane) -> Lane | None:
    if lane.axis is None:
        return lane
    if is_op(node, aten.matmul, aten.bmm):
        left = factor is node.args[0]
        behind = 2 if left else 1
        both = all(rank(x) > 1 for x in node.args[:2])  # type: ignore[arg-type]
        return Lane(rank(factor) - behind, lane.steps) if both and lane.axis == rank(node) - behind else None
    own = lane.axis - rank(node) + rank(factor)
    return Lane(own, lane.steps) if own >= 0 and shape(factor)[own] == shape(node)[lane.axis] else None


__all__ = ["Blocked", "Writing", "Written", "written"]
