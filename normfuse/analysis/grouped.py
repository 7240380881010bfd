"""Linear maps of the channels (the last axis) that are written in several operators: a projection of a flattened tensor,
sums and means of groups of channels."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from normfuse.analysis.channelwise import channelwise_operand
from normfuse.analysis.projections import projection
from normfuse.graph.node import argument, arguments, aten, is_op, positive_axis, same_size, shape
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class Groups:
    """Each of `count` numbers is `factor` times the sum of `each` channels of `source`: neighbours, or every `count`-th."""

    source: fx.Node
    count: int
    each: int
    neighbours: bool
    factor: float
    covers: frozenset[fx.Node]


def unflattened(node: fx.Node, inner: fx.Node, source: fx.Node) -> fx.Node | None:
    """The x of reshape(projection(reshape(x))), whose tokens `node` has and whose channels `source` has; else None.

    `inner` is the projection and `source` what it reads.
    """
    if not is_a(node, Trait.RESHAPE) or not is_a(source, Trait.RESHAPE) or node.args[0] is not inner:
        return None
    x: fx.Node = source.args[0]  # type: ignore[assignment]
    before, flat, after = shape(x), shape(source), shape(node)
    if len(before) != len(after) or not same_size(before[-1], flat[-1]) or not same_size(shape(inner)[-1], after[-1]):
        return None
    same = all(same_size(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    return x if same and set(inner.users) == {node} else None


def groups_of(node: fx.Node, weights: Set[fx.Node]) -> Groups | None:
    """The sums or means of groups of channels that `node` computes: by a reshape and a reduction, or as a pool along the
    channels that a linear reads."""
    if is_op(node, aten.sum, aten.mean):
        return _reduced(node)
    if is_op(node, aten.avg_pool1d) and _is_read_as_channels(node, weights):
        return _pooled(node)
    return None


def _reduced(node: fx.Node) -> Groups | None:
    split, dims = node.args[0], arguments(node).get("dim")
    if not is_a(split, Trait.RESHAPE) or argument(node, "keepdim") or dims is None:
        return None
    x: fx.Node = split.args[0]  # type: ignore[assignment,union-attr]
    before, after = shape(x), shape(split)  # type: ignore[arg-type]
    gone = [positive_axis(d, len(after)) for d in ([dims] if isinstance(dims, int) else dims)]
    many, each = after[-2:] if len(after) > 1 else (None, None)
    if not isinstance(many, int) or not isinstance(each, int) or len(after) != len(before) + 1 or len(gone) != 1:
        return None
    same = all(same_size(a, b) for a, b in zip(before[:-1], after[:-2], strict=True))
    if not same or before[-1] != many * each or gone[0] < len(before) - 1:
        return None
    neighbours = gone[0] == len(before)
    count, summed = (many, each) if neighbours else (each, many)
    factor = 1.0 / summed if is_op(node, aten.mean) else 1.0
    return Groups(x, count, summed, neighbours, factor, frozenset((node, split)))  # type: ignore[arg-type]


def _pooled(node: fx.Node) -> Groups | None:
    a = arguments(node)
    size, stride, padding = (_one(a[name]) for name in ("kernel_size", "stride", "padding"))
    before, after = shape(a["self"])[-1], shape(node)[-1]
    whole = isinstance(before, int) and isinstance(after, int) and isinstance(size, int) and before == after * size
    if not whole or stride not in (None, size) or padding:
        return None
    return Groups(a["self"], int(after), int(size), True, 1.0 / int(size), frozenset((node,)))  # type: ignore[arg-type]


def _one(item: object) -> object:
    items = [item] if isinstance(item, int) else list(item or [])  # type: ignore[call-overload]
    return items[0] if items else None


def _is_read_as_channels(node: fx.Node, weights: Set[fx.Node]) -> bool:
    """Is what reads it in the end, through scales and shifts, a linear map of its last axis?"""
    while len(node.users) == 1:
        [user] = node.users
        found = projection(user, node, weights)
        if found is not None:
            return found.channel_axis == -1
        if channelwise_operand(user, frozenset(weights)) is not node:
            return False
        node = user
    return False


__all__ = ["Groups", "groups_of", "unflattened"]
