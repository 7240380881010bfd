"""Who reads the channels of a tensor in the end: may a scale and a shift of them go into the weights of all readers?

The way from the tensor to a projection leads through operators that let a scale (and the shift) pass (`lanes`); a
positive scale passes the maximum.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from torch import fx

from normfuse.analysis.lanes import Lane, Step, behind, behind_maximum, is_gate
from normfuse.analysis.projections import Projection, projection
from normfuse.graph.node import op_name, rank, readers, shape, site
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class End:
    """A projection that reads the channels, laid out along its inputs by `steps`."""

    projection: Projection
    steps: tuple[Step, ...] = ()

    @property
    def node(self) -> fx.Node:
        return self.projection.node

    @property
    def bordered(self) -> bool:
        """Does it put zeros around its input, which a shift would not reach?"""
        return self.projection.padded

    @property
    def inputs(self) -> int:
        """How many channels it reads: its weight knows, also where image sizes are free."""
        found = self.projection
        return int(shape(found.weight)[found.in_axis]) * (1 if found.in_axis == 0 else found.groups)


@dataclass(frozen=True)
class Reach:
    """The ends; why they, or another reader, cannot take it; and whether the scale must be positive on the way."""

    ends: tuple[End, ...] = ()
    reason: str | None = None
    positive_for: fx.Node | None = None

    @property
    def shared(self) -> fx.Node | None:
        """A weight that some other call reads as well."""
        matrices = (n for end in self.ends for n in end.node.all_input_nodes if n.op == "get_attr" and rank(n) > 1)
        return next((n for n in matrices if len(n.users) > 1), None)

    @property
    def bordered(self) -> fx.Node | None:
        """A reader that puts zeros around what it reads."""
        return next((end.node for end in self.ends if end.bordered), None)


def reach(tensor: fx.Node, axis: int | None, weights: Set[fx.Node], *, shifted: bool, name: str = "it") -> Reach:
    """Follow the channels of `tensor` along `axis` (None: all its numbers are treated alike) to their readers.

    `name`: what the tensor is called in a reason.
    """
    walk = _Walk(weights, shifted, name)
    reason = walk.follow(tensor, Lane(axis))
    if reason is None and not walk.ends:
        reason = f"nothing reads {name}"
    return Reach(tuple(walk.ends), reason, walk.positive_for)


@dataclass
class _Walk:
    weights: Set[fx.Node]
    shifted: bool
    name: str
    ends: list[End] = field(default_factory=list)
    positive_for: fx.Node | None = None
    met: set[fx.Node] = field(default_factory=set)

    def follow(self, tensor: fx.Node, lane: Lane) -> str | None:
        """Why not; None if every reader is an end or lets the numbers through."""
        pending: list[tuple[fx.Node, Lane, fx.Node | None]] = [(tensor, lane, None)]
        while pending:
            node, lane, gate = pending.pop(0)
            for user in readers(node):
                if user.op == "output":
                    return f"{self.name} is also an output of the model"
                if (found := self._end(user, node, lane)) is not None:
                    if self.shifted and is_a(user, Trait.TRANSPOSED):
                        return f"a shift does not pass the transposed convolution at {site(user)}"
                    self.ends.append(found)
                    continue
                following = None if user in self.met else self._behind(user, node, lane)
                if following is None:
                    reader = gate or user
                    return f"{self.name} is also read by {op_name(reader)} at {site(reader)}"
                self.met.add(user)
                passed = gate or (user if is_gate(user, node, lane) else None)
                pending += [(*place, passed) for place in following]
        return None

    def _end(self, user: fx.Node, node: fx.Node, lane: Lane) -> End | None:
        found = projection(user, node, self.weights)
        matches = found is not None and lane.axis in (None, found.channel_axis % rank(node))
        return End(found, lane.steps) if matches else None  # type: ignore[arg-type]

    def _behind(self, user: fx.Node, node: fx.Node, lane: Lane) -> list[tuple[fx.Node, Lane]] | None:
        largest = behind_maximum(user, node, lane, shifted=self.shifted)
        if largest is not None:
            self.positive_for = user
            return [(user, largest)]
        return behind(user, node, lane, shifted=self.shifted)
