"""Attention as one operator, fed by the projections directly wherever heads are only a way to look at channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.layout import Heads, heads_of, is_layout, merged_heads
from normfuse.analysis.masks import known_mask
from normfuse.graph.node import argument, aten, dtype, is_op, is_weight, rank, readers, same_size, shape
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Exactness, Transform, Value, computed


def lower_attention(program: Program, facts: Facts, edit: Editor) -> None:
    """Every scaled_dot_product_attention becomes the Attention operator of opset 23, where that has it."""
    choice: Choice = edit.choice
    for node in computed(program):
        if not is_op(node, aten.scaled_dot_product_attention):
            continue
        counts = _counts(node) if choice.opset >= 23 else None
        torn = rank(node) != 4 and not argument(node, "dropout_p") and not argument(node, "enable_gqa")
        if (counts is None and not torn) or not edit.fire(node):
            continue
        with edit.at(node):
            if counts is not None:
                _lower(node, edit, counts)
            else:
                edit.replace(node, _in_pieces(node, edit))


RULE = Transform("lower_attention", lower_attention, exactness=Exactness.ALGEBRAIC)


def _inputs(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    return tuple(argument(node, name) for name in ("query", "key", "value"))  # type: ignore[return-value]


def _counts(node: fx.Node) -> tuple[int, int] | None:
    """Heads of the queries and of keys and values; None where Attention cannot take them."""
    sizes = [shape(n)[1] if rank(n) == 4 else 1 for n in _inputs(node)]
    if argument(node, "dropout_p") or len({rank(n) for n in _inputs(node)}) != 1 or rank(_inputs(node)[0]) not in (3, 4):
        return None
    q, k, v = (size if isinstance(size, int) else 0 for size in sizes)
    return (q, k) if k > 0 and k == v and q % k == 0 else None


def _lower(node: fx.Node, edit: Editor, counts: tuple[int, int]) -> None:
    q, k, v = _inputs(node)
    if rank(q) == 3:
        wide = [edit.call(aten.unsqueeze.default, t, 1) for t in (q, k, v)]
        edit.replace(node, edit.call(aten.squeeze.dim, _call(node, edit, wide, counts), 1))
        return
    found = [heads_of(t) for t in (q, k, v)]
    if any(h is None for h in found):
        edit.replace(node, _call(node, edit, [q, k, v], counts))
        return
    alone = _only_for(node, {h.root for h in found if h is not None})
    packed = [_channels(h, edit, split_weights=alone) for h in found if h is not None]
    end = merged_heads(node)
    result = _call(node, edit, packed, counts)
    if end is not None:
        edit.replace(end, result)
        edit.remove_dead(node)
        return
    heads = edit.call(aten.unflatten.int, result, 2, [counts[0], shape(v)[3]])
    edit.replace(node, heads.transpose(1, 2))


def _in_pieces(node: fx.Node, edit: Editor) -> Value:
    """Products and a softmax, for ranks that neither ONNX nor torch's exporter has an operator for."""
    q, k, v = _inputs(node)
    scale, mask = argument(node, "scale"), argument(node, "attn_mask")
    scores = edit.value(q) @ edit.value(k).transpose(-2, -1) * (shape(q)[-1] ** -0.5 if scale is None else scale)
    if argument(node, "is_causal"):
        sizes = [edit.call(aten.sym_size.int, t, -2) for t in (q, k)]
        mask = edit.call(aten.tril.default, edit.call(aten.ones.default, sizes, dtype=torch.bool)).node
    if mask is None:
        return edit.call(aten.softmax.int, scores, -1) @ edit.value(v)
    if dtype(mask) == torch.bool:
        closed = edit.call(aten.logical_not.default, mask)
        scores = edit.call(aten.masked_fill.Scalar, scores, closed, float("-inf"))
    else:
        scores = scores + edit.value(mask)
    return edit.call(aten._safe_softmax.default, scores, -1) @ edit.value(v)


def _call(node: fx.Node, edit: Editor, inputs: Sequence[Any], counts: tuple[int, int]) -> Value:
    scale = argument(node, "scale")
    if scale is None:
        width = shape(node.args[0])[-1]  # type: ignore[arg-type]
        scale = float(width) ** -0.5
    mask = _mask(node, edit)
    return edit.call(operators.ATTENTION.default, *inputs, mask, *counts, argument(node, "is_causal"), scale)


def _mask(node: fx.Node, edit: Editor) -> Value | None:
    """The mask with a row for each query and a column for each key: onnxruntime broadcasts over batch and heads alone."""
    mask = argument(node, "attn_mask")
    if mask is None:
        return None
    mask = _above_lowest(mask, edit)
    q, k = node.args[:2]
    rows, columns = shape(q)[-2], shape(k)[-2]  # type: ignore[arg-type]
    if rank(mask) >= 2 and same_size(shape(mask)[-2], rows) and same_size(shape(mask)[-1], columns):
        return edit.value(mask)
    sizes: list[Any] = [-1] * (rank(mask) - 2)
    sizes += [edit.call(aten.sym_size.int, q, -2), edit.call(aten.sym_size.int, k, -2)]
    return edit.call(aten.expand.default, mask, sizes)


def _above_lowest(mask: fx.Node, edit: Editor) -> fx.Node:
    """The mask with the number above the lowest one in its place.

    Of a row that is the lowest number throughout, as models write "closed", torch's softmax makes equal weights; to
    onnxruntime's Attention it is the same as -inf, and the result is zero.
    """
    kind = dtype(mask)
    if kind is None or not kind.is_floating_point:
        return mask
    lowest = torch.tensor(torch.finfo(kind).min, dtype=kind)
    above = float(torch.nextafter(lowest, torch.zeros_like(lowest)))
    known = known_mask(edit.program, mask)
    if known is not None and not bool((known == lowest.double()).any()):
        return mask
    return edit.call(aten.masked_fill.Scalar, mask, edit.call(aten.eq.Scalar, mask, float(lowest)), above).node


def _only_for(node: fx.Node, roots: set[fx.Node]) -> bool:
    """Do all of the roots' values go into this attention and nowhere else?"""
    pending, seen = list(roots), set[fx.Node]()
    while pending:
        current = pending.pop()
        for user in readers(current):
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
    if split_weights and _is_fixed(weight) and (bias is None or _is_fixed(bias)):
        with edit.at(root):
            part = edit.call(aten.slice.Tensor, weight, 0, first, last)
            shift = None if bias is None else edit.call(aten.slice.Tensor, bias, 0, first, last)
            return edit.call(aten.linear.default, root.args[0], part, shift)
    return edit.call(aten.slice.Tensor, root, 2, first, last)


def _is_fixed(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_weight(node)
