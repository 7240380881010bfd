"""Signs of weights: proved from their programs, or looked up in the values where there are values."""

from __future__ import annotations

from torch import fx

from normfuse.evaluate import Weights
from normfuse.node import aten, is_op
from normfuse.program import Program


def always_positive(node: fx.Node) -> bool:
    """Is the weight positive for every checkpoint?"""
    if is_op(node, aten.rsqrt, aten.exp, aten.softplus):
        return True
    if is_op(node, aten.mul, aten.div, aten.add):
        return all(always_positive(a) if isinstance(a, fx.Node) else _above_zero(a) for a in node.args[:2])
    source = node.args[0] if is_op(node, aten.reshape, aten.expand, aten.reciprocal) else None
    return isinstance(source, fx.Node) and always_positive(source)


def _above_zero(item: object) -> bool:
    return isinstance(item, int | float) and item > 0


def positive_here(program: Program, node: fx.Node) -> bool | None:
    """Is the weight positive in this checkpoint? None if it has no values (a plan on meta tensors)."""
    if any(t.device.type == "meta" for t in program.tensors.values()):
        return None
    return bool((Weights(program).whole(node) > 0).all())
