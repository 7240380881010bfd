"""fold_value_bias:  P (x W_v^T + b_v) W_o^T + b_o  ->  P (x W_v^T) W_o^T + (b_o + W_o b_v)

Exactness: algebraic.
Legal if:  each row of the probabilities P sums to exactly one, the values pass attention once, unscaled, and
           projections alone read the result; a value head that several query heads read counts once for each.
Leaves alone: attention with a sink or softmax1, scaled or dropped probabilities, linear attention, rows that a mask may
           leave without a key; by default everything: a bias costs nothing where it is added by the product itself.
Reference: METHODS 0, the corollary on b_v.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from normfuse.algebra.heads import without_bias
from normfuse.algebra.push import into_reader
from normfuse.analysis import Facts
from normfuse.analysis.heads import ValueHeads, value_heads
from normfuse.analysis.projections import Projection
from normfuse.analysis.row_sums import why_not_one
from normfuse.graph.node import argument, aten, is_op, op_name, shape, site
from normfuse.graph.program import Program
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite import Editor, Exactness, Transform, Value


def run(program: Program, facts: Facts, edit: Editor) -> None:
    pairs, refused = facts(value_heads)
    for mix, why in refused.items():
        edit.refuse(mix, why)
    for pair in pairs:
        if pair.writer.bias is None:
            continue
        reason = why_not_one(program, pair.mix) or _why_not_read(pair) or _on_the_way(pair)
        if reason is not None:
            edit.refuse(pair.mix, reason)
        elif edit.permit(pair.mix):
            readers = ", ".join(site(reader.node) for reader, _ in pair.readers)
            edit.fired(pair.mix, before="bias of the values", after=f"bias of {readers}")
            _move(edit, pair)


def _why_not_read(pair: ValueHeads) -> str | None:
    blocker = next((r.node for r, _ in pair.readers if is_a(r.node, Trait.TRANSPOSED)), None)
    return blocker and f"a shift does not pass the transposed convolution at {site(blocker)}"


def _on_the_way(pair: ValueHeads) -> str | None:
    """What else than a view stands between the projections and the attention: the shift would come out of it changed."""
    fused = is_op(pair.mix, aten.scaled_dot_product_attention)
    mixed: fx.Node = argument(pair.mix, "value") if fused else pair.mix.args[1]  # type: ignore[assignment]
    starts = [argument(reader.node, reader.input_name) for reader, _ in pair.readers]
    for node in [*_back(mixed, pair.writer.node), *(n for start in starts for n in _back(start, pair.mix))]:
        if is_op(node, aten.mul, aten.div, aten.neg):
            return f"{op_name(node)} at {site(node)} scales the values: run fold_scalars before"
        if is_op(node, aten.dropout) and argument(node, "train"):
            return f"the dropout at {site(node)} is on"
    return None


def _back(node: fx.Node, stop: fx.Node) -> Iterator[fx.Node]:
    while node is not stop:
        yield node
        node = node.args[0]  # type: ignore[assignment]


def _move(edit: Editor, pair: ValueHeads) -> None:
    assert pair.writer.bias is not None
    bias = edit.value(pair.writer.bias)
    for reader, columns in pair.readers:
        with edit.at(edit.current(reader.node)):
            into_reader(edit, reader, None, _shift(edit, bias, reader, pair.rows, columns))
    without_bias(edit, pair.writer, pair.rows)


def _shift(edit: Editor, bias: Value, reader: Projection, rows: Tensor, columns: Tensor) -> Value:
    """What the bias adds to each input of the reader; nothing where it reads something else."""
    source = torch.full([int(shape(reader.weight)[reader.in_axis])], bias.shape[0])
    source[columns] = rows.unsqueeze(1).expand_as(columns)
    padded = edit.call(aten.constant_pad_nd.default, bias, [0, 1])
    return edit.call(aten.index_select.default, padded, 0, edit.constant(source, "source"))


RULE = Transform("fold_value_bias", exactness=Exactness.ALGEBRAIC, on_request=True, run=run)
