"""Signs of weights: proved from their programs, or looked up in the values where there are values (else None)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from normfuse.evaluate.rows import Weights
from normfuse.graph.node import aten, is_op
from normfuse.graph.program import Program
from normfuse.ops.traits import Trait, is_a


def always_positive(node: fx.Node) -> bool:
    """Is the weight positive for every checkpoint?"""
    if is_op(node, aten.rsqrt, aten.exp, aten.softplus):
        return True
    if is_op(node, aten.mul, aten.div, aten.add):
        return all(always_positive(a) if isinstance(a, fx.Node) else _above_zero(a) for a in node.args[:2])
    source = node.args[0] if is_a(node, Trait.VIEW) or is_op(node, aten.reciprocal) else None
    return isinstance(source, fx.Node) and always_positive(source)


def _above_zero(item: object) -> bool:
    return isinstance(item, int | float) and item > 0


def positive_here(program: Program, node: fx.Node) -> bool | None:
    """Is the weight positive in this checkpoint?"""
    return _here(program, node, lambda weight: weight > 0)


def nowhere_zero(program: Program, node: fx.Node) -> bool | None:
    """Has the weight no zero in this checkpoint?"""
    return _here(program, node, lambda weight: weight != 0)


def same_everywhere(program: Program, node: fx.Node) -> bool | None:
    """Is the weight one number again and again in this checkpoint?"""
    return _here(program, node, lambda weight: weight == weight.flatten()[0])


def _here(program: Program, node: fx.Node, holds: Callable[[Tensor], Tensor]) -> bool | None:
    if any(t.device.type == "meta" for t in program.tensors.values()):
        return None
    return bool(holds(Weights(program).whole(node)).all())
