"""Attention as one operator, fed by the projections directly wherever heads are only a way to look at channels."""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.lower.onnx import operators
from normfuse.lower.onnx.choice import Choice
from normfuse.lower.onnx.layout import Heads, heads_of, is_layout, merged_heads
from normfuse.lower.onnx.tensors import constant
from normfuse.node import argument, aten, is_op, rank, same_size, shape
from normfuse.program import Program
from normfuse.rewrite import Editor, Value


def lower_attention(program: Program, edit: Editor, choice: Choice) -> None:
    """Every scaled_dot_product_attention becomes the Attention operator of opset 23."""
    if choice.opset < 23:
        return
    for node in list(program.graph.nodes):
        if is_op(node, aten.scaled_dot_product_attention) and _fits(node):
            with edit.at(node):
                _lower(node, edit)


def _fits(node: fx.Node) -> bool:
    """Dropout is none at inference; heads of queries are a multiple of those of keys and values."""
    q, k, v = node.args[:3]
    if argument(node, "dropout_p") or {rank(n) for n in (q, k, v)} - {3, 4} or len({rank(n) for n in (q, k, v)}) != 1:  # type: ignore[arg-type]
        return False
    if rank(q) == 3:  # type: ignore[arg-type]
        return True
    counts: list[Any] = [shape(n)[1] for n in (q, k, v)]  # type: ignore[arg-type]
    return all(isinstance(c, int) for c in counts) and counts[1] == counts[2] and counts[0] % counts[1] == 0


def _lower(node: fx.Node, edit: Editor) -> None:
    q, k, v = node.args[:3]
    if rank(q) == 3:  # type: ignore[arg-type]
        one, two, three = (edit.call(aten.unsqueeze.default, t, 1) for t in (q, k, v))
        edit.replace(node, edit.call(aten.squeeze.dim, _call(node, edit, one, two, three, 1, 1), 1))
        return
    counts = int(shape(q)[1]), int(shape(k)[1])  # type: ignore[arg-type]
    found = [heads_of(t) for t in (q, k, v)]  # type: ignore[arg-type]
    if any(h is None for h in found):
        edit.replace(node, _call(node, edit, q, k, v, *counts))
        return
    alone = _only_for(node, {h.root for h in found if h is not None})
    one, two, three = (_channels(h, edit, split_weights=alone) for h in found if h is not None)
    end = merged_heads(node)
    result = _call(node, edit, one, two, three, *counts)
    if end is not None:
        edit.replace(end, result)
        edit.remove_dead(node)
        return
    heads = edit.call(aten.unflatten.int, result, 2, [counts[0], shape(v)[3]])  # type: ignore[arg-type]
    edit.replace(node, heads.transpose(1, 2))


def _call(node: fx.Node, edit: Editor, q: Any, k: Any, v: Any, q_heads: int, kv_heads: int) -> Value:
    scale = argument(node, "scale")
    if scale is None:
        width = shape(node.args[0])[-1]  # type: ignore[arg-type]
        scale = float(width) ** -0.5
    mask = _mask(node, edit)
    return edit.call(operators.ATTENTION.default, q, k, v, mask, q_heads, kv_heads, argument(node, "is_causal"), scale)


def _mask(node: fx.Node, edit: Editor) -> Value | None:
    """The mask with a row for each query and a column for each key: onnxruntime broadcasts over batch and heads alone."""
    mask = argument(node, "attn_mask")
    if mask is None:
        return None
    q, k = node.args[:2]
    rows, columns = shape(q)[-2], shape(k)[-2]  # type: ignore[arg-type]
    if rank(mask) >= 2 and same_size(shape(mask)[-2], rows) and same_size(shape(mask)[-1], columns):
        return edit.value(mask)
    sizes: list[Any] = [-1] * (rank(mask) - 2)
    sizes += [edit.call(aten.sym_size.int, q, -2), edit.call(aten.sym_size.int, k, -2)]
    return edit.call(aten.expand.default, mask, sizes)


def _only_for(node: fx.Node, roots: set[fx.Node]) -> bool:
    """Do all of the roots' values go into this attention and nowhere else?"""
    pending, seen = list(roots), set[fx.Node]()
    while pending:
        current = pending.pop()
        for user in current.users:
            if user is node or user in seen:
                continue
            if not is_layout(user):
                return False
            seen.add(user)
            pending.append(user)
    return True


def _channels(heads: Heads, edit: Editor, *, split_weights: bool) -> Value:
    """The channels that the heads look at: all of the root's, or a product of their own with a part of its weight."""
    if heads.is_whole:
        return edit.value(heads.root)
    first, last = heads.offset, heads.offset + heads.channels
    root = heads.root
    weight, bias = (argument(root, "weight"), argument(root, "bias")) if is_op(root, aten.linear) else (None, None)
    if split_weights and _is_tensor(weight) and (bias is None or _is_tensor(bias)):
        with edit.at(root):
            part = _rows(edit.program, weight, first, last)
            shift = None if bias is None else _rows(edit.program, bias, first, last)
            return edit.call(aten.linear.default, root.args[0], part, shift)
    return edit.call(aten.slice.Tensor, root, 2, first, last)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _rows(program: Program, weight: fx.Node, first: int, last: int) -> fx.Node:
    name = str(weight.target)
    return constant(program, f"{name}_{first}_{last}", program.tensors[name][first:last], like=name)
