"""Projections as MatMul and Add on tensors as they are, their weights transposed once, in their programs."""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import argument, aten, is_op, is_weight, rank, same_size, shape
from normfuse.graph.program import Program
from normfuse.lower.onnx import operators
from normfuse.rewrite import Editor, Exactness, Transform, Value, computed


def unflatten_products(program: Program, facts: Facts, edit: Editor) -> None:
    """addmm(b, x.view(-1, c), w).view(x's sizes, n) is linear(x, w.T, b): the views only serve torch's matrix product."""
    for node in computed(program):
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
        if not views or len(views) != len(node.users) or not edit.fire(node):
            continue
        with edit.at(node):
            product = edit.call(aten.linear.default, source, _turned(edit, weight), bias)
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


def lower_linear(program: Program, facts: Facts, edit: Editor) -> None:
    """linear(x, w, b) -> x @ w.T + b; a weight that others read too is multiplied as it lies, by Gemm."""
    for node in computed(program):
        if not is_op(node, aten.linear) or not _is_matrix(argument(node, "weight")) or not edit.fire(node):
            continue
        x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        with edit.at(node):
            lower = _gemm if _is_read_as_it_lies(weight) else _matmul
            edit.replace(node, lower(edit, x, weight, bias))


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, fx.Node) and is_weight(weight) and rank(weight) == 2


def _is_read_as_it_lies(weight: fx.Node) -> bool:
    """Does something else than products read the weight, such as the embedding that it is tied to?"""
    return any(not is_op(user, aten.linear) for user in weight.users if not is_weight(user))


def _turned(edit: Editor, weight: fx.Node) -> Value:
    """The transposed weight, or the one that it is itself the transposed of."""
    source = weight.args[0] if _swaps(weight) else None
    return edit.value(source) if isinstance(source, fx.Node) else edit.call(aten.permute.default, weight, [1, 0])


def _swaps(node: fx.Node) -> bool:
    if is_op(node, aten.permute):
        return [axis % 2 for axis in argument(node, "dims")] == [1, 0]
    turned = is_op(node, aten.transpose) and argument(node, "dim0") % 2 != argument(node, "dim1") % 2
    return turned or is_op(node, aten.t)


def _matmul(edit: Editor, x: fx.Node, weight: fx.Node, bias: Any) -> Value:
    product = edit.call(aten.matmul.default, x, _turned(edit, weight))
    return product if bias is None else product + edit.value(bias)


def _gemm(edit: Editor, x: fx.Node, weight: fx.Node, bias: Any) -> Value:
    if rank(x) == 2:
        return edit.call(operators.GEMM.default, x, weight, bias)
    flat = edit.call(aten.reshape.default, x, [-1, shape(x)[-1]])
    sizes = [s if isinstance(s, int) else edit.call(aten.sym_size.int, x, i) for i, s in enumerate(shape(x)[:-1])]
    return edit.call(operators.GEMM.default, flat, weight, bias).reshape(*sizes, shape(weight)[0])


UNFLATTEN = Transform("unflatten_products", unflatten_products, exactness=Exactness.ALGEBRAIC)
LINEAR = Transform("lower_linear", lower_linear, exactness=Exactness.ALGEBRAIC)
