"""Writes in place in an exported graph: which can be had by other names, and must be made functional by torch itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from normfuse.graph.node import arguments, aten, is_getitem


def name_of(node: fx.Node) -> str:
    """The name of what a node calls, also of torch's higher-order operators."""
    return getattr(node.target, "__name__", str(node.target))


def mutated_by(node: fx.Node) -> list[Any]:
    """The arguments that a call writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    bound = arguments(node)
    return [bound[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return (
        node.op == "call_function"
        and schema is not None
        and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    )


def needs_functionalization(module: torch.nn.Module) -> bool:
    """Do mutations need torch's own functionalization, or is each a plain `y = f_(x)` on a value with no other name?"""
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    return any(_has_hard_mutation(graph) or _has_hard_wrapper(graph) for graph in graphs)


def _has_hard_wrapper(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            if name_of(node) == "wrap_with_autocast" and node.args[2]:
                return True
            if name_of(node) not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
                return True
    return False


def _has_hard_mutation(graph: fx.Graph) -> bool:
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        targets = mutated_by(node)
        if not targets:
            continue
        if len(targets) != 1 or functional_twin(node) is None or not isinstance(targets[0], fx.Node):
            return True
        if _is_seen_elsewhere(targets[0], node, place):
            return True
    return False


def _is_seen_elsewhere(written: fx.Node, writer: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Is the memory that `writer` writes to read after it under another name, or not the graph's own?"""
    names, pending = {written}, [written]
    while pending:
        node = pending.pop()
        shared = [user for user in node.users if _is_view(user) or is_getitem(user) or mutated_by(user)[:1] == [node]]
        if _is_view(node) or is_getitem(node) or mutated_by(node):
            shared += node.all_input_nodes[:1]
        elif node.op != "call_function":
            return True
        new = [n for n in shared if n not in names and n is not writer]
        names.update(new)
        pending += new
    others = [name for name in names if _first_name(name) is not _first_name(written)]
    return any(place[user] > place[writer] for name in others for user in name.users if user is not writer)


def _first_name(node: fx.Node) -> fx.Node:
    """Of a tensor that is written in place again and again, the node that made it."""
    while mutated_by(node):
        node = node.all_input_nodes[0]
    return node


def functional_twin(node: fx.Node) -> Any:
    """`aten.relu.default` for `aten.relu_.default`, if there is such a twin with the same arguments."""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    twin = getattr(packet, overload, None)
    if twin is None or len(twin._schema.arguments) != len(node.target._schema.arguments):  # type: ignore[union-attr]
        return None
    return twin
