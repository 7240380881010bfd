"""Who reads the channels of a tensor in the end: may a scale and a shift of them go into the weights of all readers?

The way from the tensor to a projection leads through operators that act on each channel alone. A scale passes every
linear one; a shift passes those whose weights sum to one (views, means, interpolation); a positive scale passes the
maximum. Flattening (C, H, W) repeats each channel's number H W times.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import fx

from normfuse.analysis.axes import carried_operands, carried_to
from normfuse.analysis.projections import Projection, projection
from normfuse.graph.node import argument, arguments, aten, is_op, op_name, product, rank, readers, same_size, shape, site
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class End:
    """A projection that reads the channels, each repeated `repeats` times in a row."""

    projection: Projection
    repeats: int

    @property
    def node(self) -> fx.Node:
        return self.projection.node

    @property
    def bordered(self) -> bool:
        """Does it put zeros around its input, which a shift would not reach?"""
        return self.projection.padded


@dataclass(frozen=True)
class Reach:
    """The ends; or the reason why they cannot take it; and whether the scale must be positive on the way."""

    ends: tuple[End, ...] = ()
    reason: str | None = None
    positive_for: fx.Node | None = None

    @property
    def shared(self) -> fx.Node | None:
        """A weight that some other call reads as well."""
        matrices = (n for end in self.ends for n in end.node.all_input_nodes if n.op == "get_attr" and rank(n) > 1)
        return next((n for n in matrices if len(n.users) > 1), None)


@dataclass(frozen=True)
class _Place:
    node: fx.Node
    axis: int | None


def reach(tensor: fx.Node, axis: int | None, weights: Set[fx.Node], *, shifted: bool) -> Reach:
    """Follow the channels of `tensor` along `axis` (None: all its numbers are treated alike) to their readers."""
    ends: list[End] = []
    positive_for: fx.Node | None = None
    channels = 0 if axis is None else shape(tensor)[axis]
    pending = [_Place(tensor, axis)]
    while pending:
        place = pending.pop(0)
        for user in readers(place.node):
            if user.op == "output":
                return Reach(reason="it is also an output of the model")
            found = projection(user, place.node, weights)
            if found is not None and place.axis in (None, found.channel_axis % rank(place.node)):
                if shifted and is_a(user, Trait.TRANSPOSED):
                    return Reach(reason=f"a shift does not pass the transposed convolution at {site(user)}")
                ends.append(End(found, _repeats(found, channels)))
                continue
            if is_a(user, Trait.MAX_POOL) or (is_op(user, aten.relu) and not shifted):
                positive_for = user
                pending.append(_Place(user, place.axis))
                continue
            following = _step(user, place, shifted)
            if following is None:
                return Reach(reason=f"it is also read by {op_name(user)} at {site(user)}")
            pending.append(following)
    return Reach(tuple(ends), None if ends else "nothing reads it", positive_for)


def _repeats(found: Projection, channels: Any) -> int:
    """How many inputs of the projection each channel became: its weight knows, also where image sizes are free."""
    inputs = shape(found.weight)[found.in_axis]
    return int(inputs) * (1 if found.in_axis == 0 else found.groups) // int(channels) if channels else 1


_MEANS = Trait.WHOLE | Trait.EXPAND | Trait.PART | Trait.COPY | Trait.ROLL | Trait.AVERAGE


def _step(user: fx.Node, place: _Place, shifted: bool) -> _Place | None:
    """Where the channels lie behind `user`, if it lets the scale (and the shift) through."""
    if not _averages(user) and (shifted or place.axis is None):
        return None
    if place.axis is None:
        return _Place(user, None)
    target = carried_to(user, place.node, place.axis)
    if target is not None and carried_operands(user, target) == [(place.node, place.axis)]:
        return _Place(user, target)
    return _flattened(user, place) if is_a(user, Trait.RESHAPE) else None


def _averages(user: fx.Node) -> bool:
    """Is every number of the result a weighted mean of numbers of one channel, so that a constant stays what it is?"""
    if is_a(user, _MEANS):
        return True
    if is_a(user, Trait.MEAN_POOL):
        given = arguments(user)
        padded = any(given["padding"] if isinstance(given["padding"], list) else [given["padding"]])
        return given.get("divisor_override") is None and (not padded or not given["count_include_pad"])
    if is_op(user, aten.pad):
        return argument(user, "mode") != "constant"
    return is_op(user, aten.dropout, aten.feature_dropout) and argument(user, "train") is False


def _flattened(user: fx.Node, place: _Place) -> _Place | None:
    """(.., C, H, W, ..) -> (.., C H W, ..): the axis that holds all of these, and no more."""
    before, after, axis = shape(place.node), shape(user), place.axis
    assert axis is not None
    for position in range(len(after)):
        if not same_size(product(after[:position]), product(before[:axis])):
            continue
        for end in range(axis + 2, len(before) + 1):
            if same_size(product(before[axis:end]), after[position]):
                return _Place(user, position)
    return None
