"""Rotations that the weights before cannot take, made while the model runs: what a nonlinearity or a gate writes for a
projection (R4), and queries and keys behind their positions (R3)."""

from __future__ import annotations

from collections.abc import Callable, Set

from torch import Tensor, fx

from normfuse.algebra.channels import times
from normfuse.analysis.projections import Projection, projection
from normfuse.graph.node import argument, aten, is_op, readers, shape
from normfuse.graph.program import Program
from normfuse.rewrite.editor import Editor, Value

_NONLINEAR = (aten.gelu, aten.silu, aten.relu, aten.sigmoid, aten.tanh, aten.square, aten.mish, aten.hardswish)


def turn_online(program: Program, edit: Editor, weights: Set[fx.Node], matrix: Callable[[int], Tensor | str]) -> None:
    """x W^T -> (x H) (W H)^T and q k^T -> (q H) (k H)^T, with H = matrix(width) in the graph."""
    made: dict[int, Value] = {}
    for node in list(program.graph.nodes):
        found = None if node in weights else _reader_of_nonlinear(node, weights)
        attention = is_op(node, aten.scaled_dot_product_attention) and not _is_turned(node, weights)
        if found is None and not attention:
            continue
        source: fx.Node = argument(node, found.input_name if found else "query")
        width = shape(source)[-1]
        turn = matrix(width) if isinstance(width, int) else "its width is free"
        if isinstance(turn, str):
            edit.refuse(node, turn)
        elif edit.permit(node):
            edit.fired(node, before="as it was written", after="turned online")
            if width not in made:
                made[int(width)] = edit.constant(turn, "online")
            _turn(edit, node, found, made[int(width)])


def _turn(edit: Editor, node: fx.Node, found: Projection | None, turn: Value) -> None:
    names = [found.input_name] if found else ["query", "key"]
    with edit.at(node):
        changed = {name: times(turn)(x := edit.value(argument(node, name)), x.ndim - 1) for name in names}
        if found is not None:
            changed[found.weight_name] = times(turn)(edit.value(found.weight), found.in_axis)
        edit.replace(node, edit.rebuild(node, **changed))


def _reader_of_nonlinear(node: fx.Node, weights: Set[fx.Node]) -> Projection | None:
    found = projection(node, None, weights)
    if found is None or found.channel_axis != -1:
        return None
    if all(projection(user, node, weights) for user in readers(node)):
        return None  # it is the rotation of a run before, or could be merged with what reads it
    source = argument(node, found.input_name)
    gated = is_op(source, aten.mul) and all(isinstance(a, fx.Node) and a not in weights for a in source.args[:2])
    return found if gated or is_op(source, *_NONLINEAR) else None


def _is_turned(node: fx.Node, weights: Set[fx.Node]) -> bool:
    """A projection that writes the queries could take the rotation: it is the one of a run before, or none is needed."""
    query: fx.Node = argument(node, "query")
    while is_op(query, aten.permute):
        query = query.args[0]  # type: ignore[assignment]
    return projection(query, None, weights) is not None


__all__ = ["turn_online"]
