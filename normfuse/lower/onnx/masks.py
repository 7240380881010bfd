"""Masks that depend on sizes alone, and are the causal triangle however they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from normfuse.lower.onnx.layout import concrete
from normfuse.node import argument, aten, expression, is_op, rank, same_size, shape, value
from normfuse.program import Program
from normfuse.rewrite import Editor

_LARGEST = 2048


def recognise_causal(program: Program, edit: Editor) -> None:
    """scaled_dot_product_attention(..., attn_mask=<the triangle>) -> is_causal=True, proved by evaluating the mask."""
    known: dict[fx.Node, bool] = {}
    for node in list(program.graph.nodes):
        if not is_op(node, aten.scaled_dot_product_attention):
            continue
        mask = argument(node, "attn_mask")
        if mask is None or argument(node, "is_causal") or not same_size(shape(node.args[0])[-2], shape(node.args[1])[-2]):  # type: ignore[arg-type]
            continue
        if mask not in known:
            known[mask] = _is_causal(program, mask, expression(shape(node.args[0])[-2]))  # type: ignore[arg-type]
        if known[mask]:
            with edit.at(node):
                edit.replace(node, edit.rebuild(node, attn_mask=None, is_causal=True))


def _is_causal(program: Program, mask: fx.Node, length: Any) -> bool:
    """Evaluate at several lengths: past every literal of the mask's own, where a window would show, and to tables' ends."""
    nodes = _cone(mask)
    if nodes is None or rank(mask) < 2 or value(mask).dtype != torch.bool:
        return False
    lengths = [2, 5, *(past + 3 for n in nodes for past in _literals(n)), *(s for n in nodes for s in _table(program, n))]
    if isinstance(length, int):
        lengths, own = [length], frozenset[Any]()
    else:
        own = frozenset([length])
    if max(lengths) > _LARGEST or not (isinstance(length, int) or length.is_Symbol):
        return False
    free = {s for n in nodes for s in _symbols(n)}
    for size in sorted({n for n in lengths if n > 0}):
        numbers = {symbol: size if symbol in own else 2 for symbol in free}
        if not _is_triangle(_evaluate(program, nodes, mask, numbers), size):
            return False
    return True


def _table(program: Program, node: fx.Node) -> list[int]:
    return [s for s in program.tensors[str(node.target)].shape if s > 1] if node.op == "get_attr" else []


def _cone(mask: fx.Node) -> list[fx.Node] | None:
    """Everything the mask is computed from, in order; None if that is more than sizes and tensors of the model."""
    seen: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or len(seen) > 200:
            return None
        if not is_op(node, aten.sym_size):
            pending.extend(node.all_input_nodes)
    return sorted(seen)


def _symbols(node: fx.Node) -> set[Any]:
    val = value(node)
    sizes = val.shape if isinstance(val, Tensor) else [val]
    return {s for size in sizes for s in getattr(expression(size), "free_symbols", ())}


def _literals(node: fx.Node) -> list[int]:
    return [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int) and not isinstance(a, bool) and a < 2**31]


def _evaluate(program: Program, nodes: list[fx.Node], mask: fx.Node, numbers: dict[Any, int]) -> Tensor | None:
    env: dict[fx.Node, Any] = {}
    try:
        for node in nodes:
            if node.op == "get_attr":
                env[node] = program.tensors[str(node.target)]
            elif not isinstance(value(node), Tensor | tuple | list):
                env[node] = concrete(value(node), numbers)
            else:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return env[mask]  # type: ignore[no-any-return]


def _is_triangle(mask: Tensor | None, length: int) -> bool:
    if mask is None or mask.shape[-2:] != (length, length):
        return False
    return bool((mask == torch.ones(length, length, dtype=torch.bool).tril()).all())
