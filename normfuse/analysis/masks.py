"""What a mask does to a row of scores: leaves a key to every row, closes the future, or closes whole rows."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.analysis.layout import concrete
from normfuse.evaluate.rows import Weights
from normfuse.graph.node import argument, aten, expression, invoke, is_op, is_weight, value
from normfuse.graph.program import Program
from normfuse.graph.walk import walk

_LARGEST = 2048


def mask_kind(program: Program, mask: fx.Node, length: Any) -> str:
    """Evaluate at several lengths: past every literal of the mask's own, where a window would show, and to tables' ends."""
    nodes = _cone(mask)
    if nodes is None or value(mask).dtype != torch.bool:
        return ""
    ends = [
        2,
        5,
        *(past + 3 for n in nodes for past in _literals(program, n)),
        *(s for n in nodes for s in _table(program, n)),
    ]
    ends = sorted({n for n in ends if n > 1})
    if max(ends) > _LARGEST or not (isinstance(length, int) or length.is_Symbol):
        return ""
    free = {s for n in nodes for s in _symbols(n)}
    own = [length] if isinstance(length, int) else ends
    others = [(2, 3), ends] if free - {length} else [(2,), ()]
    tried = [(size, other) for size in own for other in others[0]] + [(own[0], other) for other in others[1]]
    found = {
        _told(_evaluate(program, nodes, mask, {symbol: size if symbol == length else other for symbol in free}), size)
        for size, other in tried
    }
    return found.pop() if len(found) == 1 else ""


def known_mask(program: Program, mask: fx.Node) -> Tensor | None:
    """The mask in float64, where weights and buffers alone make it."""
    if not is_weight(mask) or any(t.device.type == "meta" for t in program.tensors.values()):
        return None
    with torch.no_grad():
        return Weights(program).whole(mask)  # type: ignore[no-any-return]


def closes_no_row(node: fx.Node, program: Program) -> bool:
    """Does the mask of an Attention leave each row something? A finite one does, and the triangle alone: its first key."""
    mask = argument(node, "mask")
    if mask is None:
        return True
    if argument(node, "causal") or value(mask).dtype == torch.bool:
        return False
    tensor = known_mask(program, mask)
    return tensor is not None and bool(torch.isfinite(tensor).all())


def _told(mask: Tensor | None, length: int) -> str:
    if mask is None:
        return ""
    if bool(mask.all()):
        return "open"
    square = mask.shape[-2:] == (length, length)
    return "triangle" if square and bool((mask == torch.ones(length, length, dtype=torch.bool).tril()).all()) else ""


def _table(program: Program, node: fx.Node) -> list[int]:
    return [s for s in program.tensors[str(node.target)].shape if s > 1] if node.op == "get_attr" else []


def _cone(mask: fx.Node) -> list[fx.Node] | None:
    """Everything the mask is computed from, in order; None if that is more than sizes and tensors of the model."""
    seen: list[fx.Node] = []
    for node in walk([mask], lambda n: () if is_op(n, aten.sym_size) else n.all_input_nodes):
        seen.append(node)
        if node.op == "placeholder" or len(seen) > 200:
            return None
    return sorted(seen)


def _symbols(node: fx.Node) -> set[Any]:
    val = value(node)
    sizes = val.shape if isinstance(val, Tensor) else [val]
    return {s for size in sizes for s in getattr(expression(size), "free_symbols", ())}


def _literals(program: Program, node: fx.Node) -> list[int]:
    """Numbers that a place could be compared with."""
    if node.op == "get_attr":
        tensor = program.tensors[str(node.target)]
        given = [tensor.item()] if tensor.numel() == 1 and tensor.dtype != torch.bool else []
    else:
        given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float) and not isinstance(a, bool)]
    return [ceil(abs(a)) for a in given if abs(a) < 2**31]


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
                env[node] = invoke(node, args, kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return env[mask]  # type: ignore[no-any-return]
