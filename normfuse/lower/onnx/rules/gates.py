"""A gate on the channels of a convolution (squeeze and excite), in onnxruntime's blocked layout where that is measured
to be faster.

Its CPU provider keeps convolutions, pointwise functions, GlobalAveragePool, Resize and products of equal shapes in
blocks of channels. ReduceMean and a product that repeats one factor over the image it takes out of them, and with the
product the sum that comes after. So the mean becomes a pool, and the gate is spread over the image first.
"""

from __future__ import annotations

import torch
from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import argument, aten, dtype, is_one, is_op, rank, shape
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice, nominal
from normfuse.lower.onnx import operators
from normfuse.lower.onnx.rules.depthwise import BLOCK, POINTWISE
from normfuse.rewrite import Editor, Exactness, Transform, computed


def spread_gates(program: Program, facts: Facts, edit: Editor) -> None:
    """x * gate, of shapes [n, c, h, w] and [n, c, 1, 1], becomes x * spread(gate), and the mean of x a pool."""
    choice: Choice = edit.choice
    if not choice.has_blocked_layout:
        return
    for node in computed(program):
        factors = _factors(node)
        if factors is None:
            continue
        x, gate = factors
        _, channels, *sides = nominal(shape(x))
        cheaper = choice.decide(edit, "gate on channels", "Mul", "Resize and Mul", size=(channels, max(sides)))
        if cheaper == "Mul" or not edit.fire(node):
            continue
        with edit.at(node):
            edit.replace(node, edit.value(x) * edit.call(operators.SPREAD.default, gate, sides))
        for mean in [user for user in x.users if _is_spatial_mean(user)]:
            with edit.at(mean):
                edit.replace(mean, edit.call(operators.GLOBAL_AVERAGE_POOL.default, x))


RULE = Transform("spread_gates", spread_gates, exactness=Exactness.ALGEBRAIC)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The image of a convolution, of known size and in whole blocks, and the gate on its channels."""
    if not is_op(node, aten.mul) or dtype(node) != torch.float32 or len(node.all_input_nodes) != 2:
        return None
    x, gate = sorted(node.all_input_nodes, key=_is_spatial_point)
    if rank(x) != 4 or not _is_spatial_point(gate) or _is_spatial_point(x) or {dtype(x), dtype(gate)} != {torch.float32}:
        return None
    channels, *sides = shape(x)[1:]
    if not all(isinstance(size, int) for size in (channels, *sides)) or shape(gate)[1] != channels:
        return None
    whole = channels % BLOCK == 0 and any(is_op(user, aten.conv2d) for user in node.users)
    return (x, gate) if whole and _is_convolution(x) else None


def _is_spatial_point(node: fx.Node) -> bool:
    return rank(node) == 4 and all(is_one(size) for size in shape(node)[2:])


def _is_convolution(node: fx.Node) -> bool:
    """A convolution, or a pointwise function of one."""
    while is_op(node, *POINTWISE) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return is_op(node, aten.conv2d)


def _is_spatial_mean(node: fx.Node) -> bool:
    if is_op(node, aten.adaptive_avg_pool2d):
        return list(argument(node, "output_size")) == [1, 1]
    return (
        is_op(node, aten.mean.dim)
        and sorted(axis % 4 for axis in argument(node, "dim") or ()) == [2, 3]
        and bool(argument(node, "keepdim"))
        and argument(node, "dtype") in (None, torch.float32)
    )
