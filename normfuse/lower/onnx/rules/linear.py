"""Projections as MatMul and Add on tensors as they are, their weights transposed once, here."""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.graph.node import argument, aten, is_op, rank, same_size, shape
from normfuse.graph.program import Program
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Value
from normfuse.rewrite.editor import constant


def unflatten_products(program: Program, edit: Editor) -> None:
    """addmm(b, x.view(-1, c), w).view(x's sizes, n) is linear(x, w.T, b): the views only serve torch's matrix product."""
    for node in list(program.graph.nodes):
        if node._erased or not is_op(node, aten.addmm, aten.mm):
            continue
        flat, weight, bias = _product(node)
        source = flat.args[0] if is_op(flat, aten.reshape) else None
        if (
            not isinstance(source, fx.Node)
            or not _is_matrix(weight)
            or rank(source) < 3
            or not same_size(shape(source)[-1], shape(flat)[-1])
        ):
            continue
        wanted = (*shape(source)[:-1], shape(node)[-1])
        views = [user for user in node.users if is_op(user, aten.reshape) and _same(shape(user), wanted)]
        if not views or len(views) != len(node.users):
            continue
        with edit.at(node):
            name = str(weight.target)
            turned = constant(program, f"{name}_rows", program.tensors[name].t(), like=name)
            product = edit.call(aten.linear.default, source, turned, bias)
        for view in views:
            edit.replace(view, product)


def _product(node: fx.Node) -> tuple[fx.Node, Any, Any]:
    if is_op(node, aten.mm):
        return node.args[0], node.args[1], None  # type: ignore[return-value]
    if argument(node, "beta") != 1 or argument(node, "alpha") != 1:
        return node, None, None
    return argument(node, "mat1"), argument(node, "mat2"), argument(node, "self")


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


def lower_linear(program: Program, edit: Editor) -> None:
    """linear(x, w, b) -> x @ w.T + b; a weight that others read too is multiplied as it lies, by Gemm."""
    for node in list(program.graph.nodes):
        if not is_op(node, aten.linear) or not _is_matrix(argument(node, "weight")):
            continue
        x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        with edit.at(node):
            shared = any(not is_op(user, aten.linear) for user in weight.users)
            edit.replace(node, _gemm(edit, x, weight, bias) if shared else _matmul(edit, x, weight, bias))


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and rank(weight) == 2


def _matmul(edit: Editor, x: fx.Node, weight: fx.Node, bias: Any) -> Value:
    name = str(weight.target)
    turned = constant(edit.program, f"{name}_t", edit.program.tensors[name].t().contiguous(), like=name)
    product = edit.call(aten.matmul.default, x, turned)
    return product if bias is None else product + edit.value(bias)


def _gemm(edit: Editor, x: fx.Node, weight: fx.Node, bias: Any) -> Value:
    if rank(x) == 2:
        return edit.call(operators.GEMM.default, x, weight, bias)
    flat = edit.call(aten.reshape.default, x, [-1, shape(x)[-1]])
    sizes = [s if isinstance(s, int) else edit.call(aten.sym_size.int, x, i) for i, s in enumerate(shape(x)[:-1])]
    return edit.call(operators.GEMM.default, flat, weight, bias).reshape(*sizes, shape(weight)[0])
