"""What it takes to change the channels that a writer writes, without touching anything else.

A writer *takes a channel map* if any linear map of its output channels can be put into its weights: projections,
embeddings, convolutions without groups, parameters, and gains (LayerScale) over such.
"""

from __future__ import annotations

from torch import fx

from normfuse.analysis.axes import carried_operands
from normfuse.analysis.row_functions import norm_over_last
from normfuse.analysis.streams import Writer
from normfuse.graph.node import (
    argument,
    aten,
    is_getitem,
    is_op,
    op_name,
    operand,
    product,
    rank,
    readers,
    same_size,
    shape,
    site,
)
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.traits import Trait, is_a


class Writers:
    """`why_not(writer)`: None if its weights take a channel map, else the reason."""

    def __init__(self, program: Program) -> None:
        self.weights = weight_only(program)

    def why_not(self, writer: Writer) -> str | None:
        return None if writer.is_weight else self._why_not(writer.node, writer.axis)

    def _why_not(self, node: fx.Node, axis: int) -> str | None:
        last = axis == rank(node) - 1
        where = f"{op_name(node)} at {site(node)}"
        if node in self.weights:
            return None
        if is_op(node, aten.linear, aten.addmm, aten.mm, aten.matmul) and last:
            name = {"linear": "weight", "addmm": "mat2", "mm": "mat2", "matmul": "other"}[op_name(node)]
            return self._needs_weight(argument(node, name), where)
        if is_a(node, Trait.CONVOLVING) and axis == 1:
            if argument(node, "groups") != 1:
                return f"{where} is a depthwise or grouped convolution, whose weights cannot mix channels"
            return self._needs_weight(argument(node, "weight"), where)
        if is_op(node, aten.embedding) and last:
            return self._needs_weight(argument(node, "weight"), where)
        if is_op(node, aten.mul) and (scaled := self.scaled(node, axis)) is not None:
            return self._why_not_inside(scaled[0], scaled[1])
        if self.normed_embedding(node, axis) is not None:
            return None
        if (piece := self.piece_of_projection(node, axis)) is not None:
            return self._needs_weight(argument(piece, "weight"), where)
        if (whole := self.heads_of_projection(node, axis)) is not None:
            return self._needs_weight(argument(whole, "weight"), where)
        return f"{where} has no weights that could take it"

    def _needs_weight(self, node: object, where: str) -> str | None:
        return None if isinstance(node, fx.Node) and node in self.weights else f"{where} has computed weights"

    def _why_not_inside(self, node: fx.Node, axis: int) -> str | None:
        """Below a gain, every tensor must be the gain's alone."""
        if node in self.weights:
            return None
        if len(readers(node)) != 1:
            return f"{op_name(node)} at {site(node)} stands below a gain and is also read elsewhere"
        operands = carried_operands(node, axis)
        if operands is None:
            return self._why_not(node, axis)
        return next((why for n, a in operands if (why := self._why_not_inside(n, a))), None)

    def scaled(self, node: fx.Node, axis: int) -> tuple[fx.Node, int, fx.Node, int] | None:
        """x * gain, with a gain per channel: (x, its axis, gain, its axis)."""
        if not is_op(node, aten.mul):
            return None
        for x, gain in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if not isinstance(x, fx.Node) or not isinstance(gain, fx.Node) or gain not in self.weights or x in self.weights:
                continue
            x_axis, gain_axis = axis - rank(node) + rank(x), axis - rank(node) + rank(gain)
            whole = x_axis >= 0 and gain_axis >= 0 and same_size(shape(x)[x_axis], shape(gain)[gain_axis])
            others = [s for i, s in enumerate(shape(gain)) if i != gain_axis]
            if whole and all(s == 1 for s in others):
                return x, x_axis, gain, gain_axis
        return None

    def normed_embedding(self, node: fx.Node, axis: int) -> fx.Node | None:
        """norm(embedding(E, ids)) is embedding(norm(E), ids) if the norm alone reads the embedding: that embedding."""
        source = node.args[0] if axis == rank(node) - 1 and norm_over_last(node) else None
        if not isinstance(source, fx.Node) or not is_op(source, aten.embedding):
            return None
        plain = argument(source, "weight") in self.weights and readers(source) == (node,)
        return source if plain else None

    def piece_of_projection(self, node: fx.Node, axis: int) -> fx.Node | None:
        """The linear of which `node` is a chunk along the channels, if nothing else reads these channels of it."""
        if not is_getitem(node) or axis != rank(node) - 1:
            return None
        split = operand(node)
        source = split.args[0]
        along = is_a(split, Trait.SPLIT) and argument(split, "dim") in (-1, axis)
        if not along or not isinstance(source, fx.Node) or not is_op(source, aten.linear):
            return None
        same = [n for n in readers(split) if not is_getitem(n) or n.args[1] == node.args[1]]
        return source if readers(source) == (split,) and same == [node] else None

    def heads_of_projection(self, node: fx.Node, axis: int) -> fx.Node | None:
        """The linear whose outputs `node` splits into (heads, channels), if nothing else reads them."""
        if not is_a(node, Trait.RESHAPE) or axis != rank(node) - 1 or rank(node) < 2:
            return None
        source = operand(node)
        outputs = shape(source)[-1] if shape(source) else 0
        split = same_size(product(shape(node)[-2:]), outputs) and not same_size(shape(node)[-1], outputs)
        mine = is_op(source, aten.linear) and readers(source) == (node,)
        return source if split and mine and isinstance(shape(node)[-1], int) else None


def writers(program: Program) -> Writers:
    """The analysis as a fact of a program."""
    return Writers(program)
