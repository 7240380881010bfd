"""Scales and shifts that stand in a graph: those of norms, and the largest diagonal map that ends at a node."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from normfuse.analysis.affine import Affine, AffineMap, Channelwise, identity
from normfuse.analysis.channelwise import acts_on, channelwise_operand
from normfuse.graph.node import argument, arguments, dtype, positive_axis, rank, shape
from normfuse.ops import Operator, operator_of


@dataclass(frozen=True)
class Gain:
    """What `node`, a norm or a squashing function, does last: y = weight * n + bias.

    `axis`: of the result, along which the two lie; None where they are no numbers per channel, or one number for all.
    """

    node: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    axis: int | None

    @property
    def parameters(self) -> list[fx.Node]:
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def is_scalar(self) -> bool:
        """One number for all?"""
        return all(size == 1 for p in self.parameters for size in shape(p))

    def is_of(self, weights: Set[fx.Node]) -> bool:
        """Are they numbers of the model?"""
        return all(p in weights for p in self.parameters)


def gain_of(node: fx.Node) -> Gain | None:
    """Gain and shift of a known norm or squashing function that has them; else None."""
    record = operator_of(node.target)
    if record is None or record.gain is None or record.role not in ("norm", "squash"):
        return None
    given = arguments(node)
    shift = None if record.shift is None else given[record.shift]
    return Gain(node, given[record.gain], shift, _axis(node, record))


def _axis(node: fx.Node, record: Operator) -> int | None:
    if record.role == "squash":
        return _broadcast_axis(node)
    if not record.row:
        return 1  # gains of norms over channels or images lie along the channels
    axes = record.axes_of(arguments(node), shape(node))
    return positive_axis(axes[0], rank(node)) if len(axes) == 1 else None


def _broadcast_axis(node: fx.Node) -> int | None:
    """Where parameters that broadcast with the input have their numbers."""
    found: set[int] = set()
    for name in ("weight", "bias"):
        parameter = argument(node, name)
        if parameter is not None:
            ahead = rank(node) - rank(parameter)
            found |= {ahead + place for place, size in enumerate(shape(parameter)) if size != 1}
    return found.pop() if len(found) == 1 else None


def diagonal_part(affine: Affine, node: fx.Node) -> AffineMap | None:
    """The largest map of one number per channel (or one for all) that ends at `node`, in one dtype; of an `Affine`
    that knows diagonal maps alone."""
    m = affine.map(node)
    ends = m.node is not None and m.source is not node and dtype(m.source) == dtype(node)
    return m if ends and m.diagonal and not m.windows else None


def alone(node: fx.Node, weights: frozenset[fx.Node]) -> AffineMap:
    """What a channelwise operator does itself, as a map of its operand."""
    operand = channelwise_operand(node, weights)
    assert operand is not None
    axis, shifted = acts_on(node, operand, weights)
    recipe = Channelwise(node, operand, identity(operand))
    return AffineMap(operand, recipe, node, axis, shifted=shifted, covers=frozenset((node,)))

