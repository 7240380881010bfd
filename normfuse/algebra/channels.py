"""Putting a linear map of the channels into the weights of whatever writes them."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from normfuse.analysis.axes import carried_operands
from normfuse.analysis.streams import Writer
from normfuse.analysis.writers import Writers
from normfuse.graph.node import argument, aten, is_op, rank, shape
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite.editor import Editor, Value

ChannelMap = Callable[[Value, int], Value]
"""`f(weight, axis)`: the weight with its channels, which lie along `axis`, mapped. Must be linear."""


def centre(value: Value, axis: int) -> Value:
    """The map x -> x - mean(x): subtract the mean over the channels."""
    return value - value.mean(axis)


def times(matrix: Value) -> ChannelMap:
    """The map x -> x @ matrix."""

    def apply(weight: Value, axis: int) -> Value:
        last, factor = weight.ndim - 1, matrix.to(weight.node.meta["val"].dtype)
        return weight @ factor if axis == last else (weight.transpose(axis, last) @ factor).transpose(axis, last)

    return apply


def narrow(edit: Editor, node: fx.Node, axis: int, before: int, after: int) -> None:
    """Derive `node` anew whose input has `after` instead of `before` channels, which come to lie along `axis`.

    Sizes that the model's code wrote as literals change with them.
    """
    if is_op(node, aten.reshape, aten.expand):
        sizes = list(node.args[1])  # type: ignore[arg-type]
        sizes[axis] = after if isinstance(sizes[axis], int) and sizes[axis] == before else sizes[axis]
        node.args = (node.args[0], sizes, *node.args[2:])
    edit.refresh(node)


def map_writer(edit: Editor, facts: Writers, writer: Writer, f: ChannelMap) -> None:
    """Replace what `writer` writes by its image under `f`. Only for writers that `facts.why_not` has nothing against."""
    if writer.reader is not None:
        with edit.at(writer.reader):
            edit.replace_input(writer.reader, writer.node, f(edit.value(writer.node), writer.axis))
        return
    _map(edit, facts, writer.node, writer.axis, f)


def _map(edit: Editor, facts: Writers, node: fx.Node, axis: int, f: ChannelMap) -> None:
    with edit.at(node):
        if (scaled := facts.scaled(node, axis)) is not None and not is_op(node, aten.linear):
            _map_scaled(edit, facts, node, scaled, f)
        elif (source := facts.normed_embedding(node, axis)) is not None:
            table = edit.rebuild(node, **{_first(node): argument(source, "weight")})
            edit.replace(node, edit.rebuild(source, weight=f(table, 1)))
        elif (projection := facts.piece_of_projection(node, axis)) is not None:
            _map_piece(edit, node, projection, f)
        elif (whole := facts.heads_of_projection(node, axis)) is not None:
            _map_heads(edit, whole, int(shape(node)[-1]), f)
        else:
            edit.replace(node, edit.rebuild(node, **_mapped_weights(edit, node, f)))


def _first(node: fx.Node) -> str:
    return str(node.target._schema.arguments[0].name)  # type: ignore[union-attr]


def _mapped_weights(edit: Editor, node: fx.Node, f: ChannelMap) -> dict[str, Value]:
    names = {
        aten.linear: (("weight", 0), ("bias", 0)),
        aten.addmm: (("mat2", 1), ("self", -1)),
        aten.mm: (("mat2", 1),),
        aten.matmul: (("other", -1),),
        aten.embedding: (("weight", 1),),
    }
    places = names.get(node.target.overloadpacket, ())  # type: ignore[union-attr]
    if is_a(node, Trait.CONVOLUTION):
        places = (("weight", 0), ("bias", 0))
    if is_a(node, Trait.TRANSPOSED):
        places = (("weight", 1), ("bias", 0))
    mapped: dict[str, Value] = {}
    for name, axis in places:
        weight = argument(node, name)
        if isinstance(weight, fx.Node):
            mapped[name] = f(edit.value(weight), axis % rank(weight))
    return mapped


def _map_scaled(
    edit: Editor, facts: Writers, node: fx.Node, scaled: tuple[fx.Node, int, fx.Node, int], f: ChannelMap
) -> None:
    """f(gain * x): the gain goes into the writers of x first, then the map."""
    x, x_axis, gain, gain_axis = scaled
    vector = edit.value(gain)
    if rank(gain) > 1:
        vector = vector.reshape(shape(gain)[gain_axis])

    def scale_then_map(weight: Value, axis: int) -> Value:
        return f(weight * vector.along(axis, weight.ndim), axis)

    edit.replace(node, x)
    _map_inside(edit, facts, x, x_axis, scale_then_map, None)


def _map_inside(edit: Editor, facts: Writers, node: fx.Node, axis: int, f: ChannelMap, reader: fx.Node | None) -> None:
    if node in facts.weights and reader is not None:
        map_writer(edit, facts, Writer(node, axis, reader), f)
        return
    operands = carried_operands(node, axis)
    if operands is None:
        _map(edit, facts, node, axis, f)
        return
    for operand, operand_axis in operands:
        _map_inside(edit, facts, operand, operand_axis, f, node)


def _map_piece(edit: Editor, node: fx.Node, projection: fx.Node, f: ChannelMap) -> None:
    """One chunk of a wider projection: map its rows of the weight and leave the others."""
    split: fx.Node = node.args[0]  # type: ignore[assignment]
    widths = [int(v.shape[-1]) for v in split.meta["val"]]
    index = int(node.args[1])  # type: ignore[arg-type]
    start = sum(widths[:index])
    stop, total = start + widths[index], sum(widths)
    mapped: dict[str, Value] = {}
    for name in ("weight", "bias"):
        weight = argument(projection, name)
        if not isinstance(weight, fx.Node):
            continue
        rows = [edit.call(aten.slice.Tensor, weight, 0, a, b) for a, b in ((0, start), (start, stop), (stop, total))]
        parts = [rows[0], f(rows[1], 0), rows[2]]
        mapped[name] = edit.call(aten.cat.default, [p for p, n in zip(parts, (start, 1, total - stop), strict=True) if n])
    with edit.at(projection):
        edit.replace(projection, edit.rebuild(projection, **mapped))


def _map_heads(edit: Editor, projection: fx.Node, width: int, f: ChannelMap) -> None:
    """Each head's rows of the weight are mapped alike."""

    def by_head(weight: Value, axis: int) -> Value:
        rows, *rest = weight.shape
        return f(weight.reshape(int(rows) // width, width, *rest), 1).reshape(rows, *rest)

    with edit.at(projection):
        edit.replace(projection, edit.rebuild(projection, **_mapped_weights(edit, projection, by_head)))


__all__ = ["ChannelMap", "centre", "map_writer", "narrow", "times"]
