"""Known functions of the last axis: what their records say is what the proofs about streams need."""

from __future__ import annotations

from torch import fx

from normfuse.graph.node import arguments, shape
from normfuse.ops import Operator, operator_of


def axes_of(node: fx.Node) -> tuple[int, ...]:
    """The axes that a known function is over, negative; none for what is not known."""
    record = operator_of(node.target)
    return () if record is None else record.axes_of(arguments(node), shape(node))


def over_last(node: fx.Node) -> Operator | None:
    """The record of a row function over the last axis alone."""
    record = operator_of(node.target)
    return record if record is not None and record.row and axes_of(node) == (-1,) else None


def norm_over_last(node: fx.Node) -> Operator | None:
    """That of a norm which has a gain."""
    record = over_last(node)
    return record if record is not None and record.role == "norm" and record.gain is not None else None
