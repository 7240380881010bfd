"""Taking blocks of rows (heads) out of a weight and putting other ones in their place, as weight programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normfuse.analysis.heads import ValueHeads
from normfuse.analysis.projections import Projection
from normfuse.graph.node import argument, aten, is_op
from normfuse.rewrite.editor import Editor, Value


def take(edit: Editor, weight: Value, axis: int, index: Tensor) -> Value:
    """Slices of `weight` along `axis` at `index` (any shape): index.shape + (everything else, flat)."""
    first = weight.transpose(0, axis) if axis else weight
    rows = edit.call(aten.index_select.default, first, 0, _constant(edit, index.flatten()))
    return rows.reshape(*index.shape, -1)


def put(edit: Editor, weight: Value, axis: int, index: Tensor, blocks: Value) -> Value:
    """`weight` with `blocks`, shaped as `take` returned them, in the place of those slices."""
    first = weight.transpose(0, axis) if axis else weight
    rows = blocks.reshape(index.numel(), *first.shape[1:])
    changed = edit.call(aten.index_copy.default, first, 0, _constant(edit, index.flatten()), rows)
    return changed.transpose(0, axis) if axis else changed


def map_outputs(edit: Editor, found: Projection, index: Tensor, left: Value) -> dict[str, Value]:
    """Arguments of the projection whose outputs at `index` (head, channel) are `left` times what they were."""
    weight = edit.value(found.weight)
    blocks = take(edit, weight, found.out_axis, index)
    changed = {found.weight_name: put(edit, weight, found.out_axis, index, left @ blocks)}
    if found.bias_name is not None and found.bias is not None:
        bias = edit.value(found.bias)
        changed[found.bias_name] = put(edit, bias, 0, index, left @ take(edit, bias, 0, index))
    return changed


def map_inputs(edit: Editor, found: Projection, index: Tensor, left: Value) -> dict[str, Value]:
    """Arguments of the projection whose weights for the inputs at `index` are `left` times what they were."""
    weight = edit.value(found.weight)
    blocks = take(edit, weight, found.in_axis, index)
    return {found.weight_name: put(edit, weight, found.in_axis, index, left @ blocks)}


def map_value_heads(edit: Editor, pair: ValueHeads, value_map: Value, output_map: Value) -> None:
    """v <- value_map v per head, and the weights that read a head <- output_map times them."""
    _rebuild(edit, pair.writer, lambda found: map_outputs(edit, found, pair.rows, value_map))
    for reader, columns in pair.readers:
        _rebuild(edit, reader, lambda found, columns=columns: map_inputs(edit, found, columns, output_map))


@dataclass(frozen=True)
class Side:
    """Weights of one projection, by (head, copy, channel): those that write these channels, or (`reads`) read them."""

    projection: Projection
    index: Tensor
    reads: bool = False


def gather(edit: Editor, side: Side) -> Value:
    """(head, channel, everything else): copies side by side, and a bias as one column more."""
    found = replace(side.projection, node=edit.current(side.projection.node))
    blocks = take(edit, edit.value(found.weight), found.in_axis if side.reads else found.out_axis, side.index)
    if not side.reads and found.bias is not None:
        blocks = edit.op("cat", [blocks, take(edit, edit.value(found.bias), 0, side.index)], -1)
    heads, copies, width, rest = blocks.shape
    return blocks.transpose(1, 2).reshape(heads, width, int(copies) * int(rest))


def scatter(edit: Editor, side: Side, blocks: Value) -> None:
    """Put back what `gather` took, changed."""

    def arguments(found: Projection) -> dict[str, Value]:
        heads, copies, width = side.index.shape
        weight, axis = edit.value(found.weight), found.in_axis if side.reads else found.out_axis
        apart = blocks.reshape(heads, width, copies, -1).transpose(1, 2)
        if side.reads or found.bias is None or found.bias_name is None:
            return {found.weight_name: put(edit, weight, axis, side.index, apart)}
        last = int(apart.shape[-1]) - 1
        rows, column = edit.op("slice", apart, -1, 0, last), edit.op("slice", apart, -1, last, last + 1)
        bias = put(edit, edit.value(found.bias), 0, side.index, column)
        return {found.weight_name: put(edit, weight, axis, side.index, rows), found.bias_name: bias}

    _rebuild(edit, side.projection, arguments)


def without_bias(edit: Editor, found: Projection, index: Tensor) -> None:
    """The outputs at `index` get no bias any more; where none is left, the projection has none."""
    found = replace(found, node=edit.current(found.node))
    assert found.bias is not None and found.bias_name is not None
    bias, node = edit.value(found.bias), found.node
    with edit.at(node):
        if len(index.unique()) < bias.shape[0]:
            kept = put(edit, bias, 0, index, edit.call(aten.zeros_like.default, take(edit, bias, 0, index)))
            new = edit.rebuild(node, **{found.bias_name: kept})
        elif is_op(node, aten.addmm):
            new = edit.op("mm", argument(node, "mat1"), argument(node, "mat2"))
        else:
            new = edit.rebuild(node, **{found.bias_name: None})
        edit.replace(node, new)


def _rebuild(edit: Editor, found: Projection, arguments: Callable[[Projection], dict[str, Value]]) -> None:
    found = replace(found, node=edit.current(found.node))
    with edit.at(found.node):
        edit.replace(found.node, edit.rebuild(found.node, **arguments(found)))


def _constant(edit: Editor, index: Tensor) -> Value:
    for name, known in edit.program.tensors.items():
        if name.startswith(f"{edit.pass_name}.index") and known.shape == index.shape and torch.equal(known, index):
            node = next((n for n in edit.program.graph.nodes if n.op == "get_attr" and n.target == name), None)
            if node is not None:
                return edit.value(node)
    return edit.constant(index, "index")
