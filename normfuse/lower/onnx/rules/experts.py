"""Mixtures of experts: a product whose rows, sorted by expert, each have a matrix of their own."""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.graph.node import argument, aten, is_op, rank, shape
from normfuse.graph.program import Program
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Value
from normfuse.rewrite.editor import constant


def lower_experts(program: Program, edit: Editor) -> None:
    """grouped_mm(x, w, ends) -> for each expert its rows times its matrix: torch's exporter knows no such operator."""
    for node in list(program.graph.nodes):
        parts = _parts(node)
        if parts is None:
            continue
        x, weight, ends = parts
        with edit.at(node):
            matrices = [_matrix(edit, weight, expert) for expert in range(int(shape(weight)[0]))]  # type: ignore[arg-type]
            edit.replace(node, edit.call(operators.GROUPED_MM.default, x, matrices, ends))


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


def _matrix(edit: Editor, weight: fx.Node, expert: int) -> Any:
    if weight.op == "get_attr":
        name = str(weight.target)
        return constant(edit.program, f"{name}_{expert}", edit.program.tensors[name][expert].contiguous(), like=name)
    inner = weight.args[0] if is_op(weight, aten.permute) and argument(weight, "dims") == [0, 2, 1] else None
    if isinstance(inner, fx.Node) and inner.op == "get_attr":
        name = str(inner.target)
        turned = edit.program.tensors[name][expert].t().contiguous()
        return constant(edit.program, f"{name}_{expert}_t", turned, like=name)
    chosen: Value = edit.call(aten.select.int, weight, 0, expert)
    return chosen
