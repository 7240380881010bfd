"""Biases that attention does not feel, or only hands on: a key's shifts a whole row of scores, a value's every result.

softmax(q (k + c)^T) = softmax(q k^T + a number per row) = softmax(q k^T), and weights that sum to 1 send v + c to their
mean + c. So the key's bias goes, and the value's goes through the output projection into its bias.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.masks import closes_no_row
from normfuse.graph.node import argument, aten, is_op, is_weight, rank, same_size, shape
from normfuse.graph.program import Program
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Exactness, Transform, Value, computed


def drop_attention_biases(program: Program, facts: Facts, edit: Editor) -> None:
    """Projections of keys and values lose their bias: their product is then a MatMul and nothing else."""
    count = 0
    for node in computed(program):
        if is_op(node, operators.ATTENTION):
            count += _drop_key_bias(node, edit) + _move_value_bias(node, edit)
    if count:
        edit.tell(("attention biases", ""), f"{count} biases of keys and values dropped or moved behind the attention")


RULE = Transform("drop_attention_biases", drop_attention_biases, exactness=Exactness.ALGEBRAIC)


def _is_biased(node: fx.Node, attention: fx.Node) -> bool:
    """A projection of fixed weight and bias that this attention alone reads, once."""
    if not is_op(node, aten.linear) or list(node.users) != [attention] or list(attention.args).count(node) != 1:
        return False
    weight, bias = argument(node, "weight"), argument(node, "bias")
    return _is_weight(weight) and rank(weight) == 2 and _is_weight(bias)


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_weight(node)


def _drop_key_bias(node: fx.Node, edit: Editor) -> int:
    key = argument(node, "k")
    if not _is_biased(key, node) or not edit.fire(key):
        return 0
    with edit.at(key):
        edit.replace(key, edit.rebuild(key, bias=None))
    return 1


def _move_value_bias(node: fx.Node, edit: Editor) -> int:
    values, readers = argument(node, "v"), list(node.users)
    if not _is_biased(values, node) or not readers or not _rows_sum_to_one(node, edit.program):
        return 0
    if not all(_is_output(reader, node) for reader in readers) or not edit.fire(values):
        return 0
    shift = _of_every_query(argument(values, "bias"), argument(node, "q_heads"), argument(node, "kv_heads"), edit)
    for reader in readers:
        _shift(reader, shift, edit)
    with edit.at(values):
        edit.replace(values, edit.rebuild(values, bias=None))
    return 1


def _rows_sum_to_one(node: fx.Node, program: Program) -> bool:
    """As `closes_no_row`; a causal mask leaves each of as many queries its own key."""
    q, k = argument(node, "q"), argument(node, "k")
    return closes_no_row(node, program) and (not argument(node, "causal") or same_size(shape(q)[-2], shape(k)[-2]))


def _is_output(reader: fx.Node, attention: fx.Node) -> bool:
    if not is_op(reader, aten.linear) or argument(reader, "input") is not attention:
        return False
    weight, bias = argument(reader, "weight"), argument(reader, "bias")
    return _is_weight(weight) and rank(weight) == 2 and (bias is None or _is_weight(bias))


def _of_every_query(bias: fx.Node, queries: int, keys: int, edit: Editor) -> Value:
    """The bias of the values (keys * width) for the heads that read them (queries * width)."""
    if queries == keys:
        return edit.value(bias)
    heads = edit.value(bias).reshape(keys, 1, -1)
    return edit.call(aten.expand.default, heads, [-1, queries // keys, -1]).reshape(-1)


def _shift(reader: fx.Node, shift: Value, edit: Editor) -> None:
    """linear(x + shift, w, b) -> linear(x, w, b + w shift)."""
    bias = argument(reader, "bias")
    with edit.at(reader):
        moved = edit.value(argument(reader, "weight")) @ shift
        edit.replace(reader, edit.rebuild(reader, bias=moved if bias is None else moved + edit.value(bias)))
