"""Attention as products and a softmax, where the measurements say that one operator would leave threads idle.

The operator gives each head of each sample to one thread, a product is cut further: 3 heads on 2 threads are done in the
time of 4 by the one, of 3 by the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.masks import closes_no_row
from normfuse.graph.node import argument, aten, dtype, is_op, rank, same_size, shape
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice, nominal
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Exactness, Transform, Value, computed
from normfuse.rewrite.editor import constant


def spell_attention(program: Program, facts: Facts, edit: Editor) -> None:
    """Attention operators that cost more than their pieces become those. `target="onnx"` keeps the standard operator."""
    choice: Choice = edit.choice
    if choice.target == "onnx":
        return
    for node in computed(program):
        if not is_op(node, operators.ATTENTION) or not _can_be_pieces(node, program):
            continue
        cheaper = choice.decide(edit, "attention", "Attention", "MatMul and Softmax", size=_size(node))
        if cheaper == "MatMul and Softmax" and edit.fire(node):
            with edit.at(node):
                edit.replace(node, _pieces(node, edit))


RULE = Transform("spell_attention", spell_attention, exactness=Exactness.ALGEBRAIC)


def _can_be_pieces(node: fx.Node, program: Program) -> bool:
    q, k, causal = (argument(node, name) for name in ("q", "k", "causal"))
    square = same_size(shape(q)[-2], shape(k)[-2]) and isinstance(shape(q)[-2], int)
    same_heads = argument(node, "q_heads") == argument(node, "kv_heads")
    known = dtype(q) == torch.float32  # what onnxruntime has the scaled product for on a CPU
    return known and same_heads and closes_no_row(node, program) and (square or not causal)


def _size(node: fx.Node) -> tuple[int, int, int, int]:
    """(batch, length, channels, heads), as the table has them."""
    q, heads = argument(node, "q"), argument(node, "q_heads")
    batch, *_, length, last = nominal(shape(q))
    return batch, length, last if rank(q) == 3 else last * heads, heads


def _pieces(node: fx.Node, edit: Editor) -> Value:
    q, k, v = (argument(node, name) for name in ("q", "k", "v"))
    flat, heads = rank(q) == 3, argument(node, "q_heads")
    queries = _heads(q, heads, edit, (0, 2, 1, 3)) if flat else edit.value(q)
    keys = _heads(k, heads, edit, (0, 2, 3, 1)) if flat else edit.value(k).transpose(-2, -1)
    values = _heads(v, heads, edit, (0, 2, 1, 3)) if flat else edit.value(v)
    scores = edit.call(operators.SCALED_PRODUCT.default, queries, keys, argument(node, "scale"))
    mask: Any = argument(node, "mask")
    if argument(node, "causal"):
        mask = _triangle(edit.program, shape(q)[-2], q)
    if mask is not None:
        scores = scores + edit.value(mask)
    mixed = edit.call(aten.softmax.int, scores, -1) @ values
    if not flat:
        return mixed
    channels = heads * (shape(v)[2] // heads)
    return edit.call(operators.RESHAPE.default, mixed.transpose(1, 2), [0, 0, channels])


def _heads(x: fx.Node, heads: int, edit: Editor, order: tuple[int, ...]) -> Value:
    split = edit.call(operators.RESHAPE.default, x, [0, 0, heads, shape(x)[2] // heads])
    return edit.call(aten.permute.default, split, list(order))


def _triangle(program: Program, length: Any, like: fx.Node) -> fx.Node:
    closed = torch.ones(length, length, dtype=torch.bool).triu(1)
    kind = like.meta["val"].dtype
    mask = torch.zeros(length, length, dtype=kind).masked_fill(closed, -torch.inf)
    return constant(program, f"normfuse_triangle_{length}", mask)
