"""Parameter-only subgraphs: what can be computed before the first input arrives."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.node import aten, is_getitem, is_op, value
from normfuse.program import Program

# Nothing is computed by these: they are other looks at the same memory.
_VIEWS = (
    aten.view, aten.reshape, aten.transpose, aten.permute, aten.t, aten.expand, aten.unsqueeze, aten.squeeze, aten.slice,
    aten.select, aten.flatten, aten.unflatten, aten.alias, aten.narrow, aten.split, aten.chunk, aten.unbind,
    aten.movedim, aten.swapaxes,
)  # fmt: skip


def is_random(node: fx.Node) -> bool:
    """Does the operator draw random numbers? (Dropout at inference does not.)"""
    if node.op != "call_function" or not hasattr(node.target, "tags"):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    if is_op(node, aten.scaled_dot_product_attention):
        return len(node.args) > 4 and bool(node.args[4] != 0.0)
    return not (is_op(node, aten.dropout, aten.feature_dropout, aten.alpha_dropout) and node.args[2] is False)


def constants(program: Program) -> frozenset[fx.Node]:
    """Nodes that depend on parameters, buffers and literals alone: no input, no free size, no random numbers."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        fixed = node.op == "call_function" and not is_random(node) and all(n in known for n in node.all_input_nodes)
        if fixed or node.op == "get_attr":
            known.add(node)
    return frozenset(known)


def weight_only(program: Program) -> frozenset[fx.Node]:
    """The constants that read at least one tensor of the model (a literal table such as `arange(4)` reads none)."""
    fixed = constants(program)
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" or (node in fixed and any(n in known for n in node.all_input_nodes)):
            known.add(node)
    return frozenset(known)


def is_view(node: fx.Node) -> bool:
    return is_op(node, *_VIEWS) or is_getitem(node)


def frontier(program: Program) -> list[fx.Node]:
    """The computed weights: weight-only calls that something else reads, in graph order.

    A trailing view belongs to the weight if nothing reads the weight but through it.
    """
    inside = weight_only(program)
    found: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node in inside and any(user not in inside for user in node.users):
            views: list[fx.Node] = []
            while is_view(node):
                views.append(node)
                node = node.all_input_nodes[0]
            if node.op == "call_function" and isinstance(value(node), torch.Tensor):
                found[_with_own_views(node, views)] = None
    return list(found)


_RESHAPES = (
    aten.view, aten.reshape, aten.transpose, aten.permute, aten.t, aten.unsqueeze, aten.squeeze, aten.flatten,
    aten.unflatten,
)  # fmt: skip


def _with_own_views(weight: fx.Node, views: list[fx.Node]) -> fx.Node:
    """The last of the views (outermost first) that stands alone on the weight and keeps its size."""
    while views and len(weight.users) == 1 and is_op(views[-1], *_RESHAPES):
        weight = views.pop()
    return weight
