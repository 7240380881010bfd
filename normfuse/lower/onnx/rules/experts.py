"""Mixtures of experts: a product whose rows, sorted by expert, each have a matrix of their own."""

from __future__ import annotations

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import argument, aten, is_op, rank, shape
from normfuse.graph.program import Program
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Exactness, Transform, computed


def lower_experts(program: Program, facts: Facts, edit: Editor) -> None:
    """grouped_mm(x, w, ends) -> for each expert its rows times its matrix: torch's exporter knows no such operator."""
    for node in computed(program):
        parts = _parts(node)
        if parts is None or not edit.fire(node):
            continue
        x, weight, ends = parts
        with edit.at(node):
            count = int(shape(weight)[0])
            matrices = [edit.call(aten.select.int, weight, 0, expert) for expert in range(count)]
            edit.replace(node, edit.call(operators.GROUPED_MM.default, x, matrices, ends))


RULE = Transform("lower_experts", lower_experts, exactness=Exactness.ALGEBRAIC)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Rows, matrices and where each expert's rows end; None for another operator, or another use of this one."""
    if is_op(node, aten._grouped_mm):
        x, weight, ends = (argument(node, name) for name in ("self", "mat2", "offs"))
        if argument(node, "bias") is not None or argument(node, "out_dtype") is not None:
            return None
    elif str(node.target) == "transformers.grouped_mm_fallback.default":
        x, weight, ends = (argument(node, name) for name in ("input", "weight", "offs"))
    else:
        return None
    if not isinstance(ends, fx.Node) or rank(x) != 2 or rank(weight) != 3 or not isinstance(shape(weight)[0], int):
        return None
    return x, weight, ends
