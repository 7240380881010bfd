"""A convolution with one input channel and k outputs per group as k depthwise ones, where those are measured to be faster.

onnxruntime keeps depthwise convolutions in its blocked layout and takes others with groups out of it. The k results lie
side by side instead of interleaved: the convolution that reads them takes its input channels in that order.
"""

from __future__ import annotations

import sys

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import argument, aten, is_op, is_weight, shape
from normfuse.graph.program import Program
from normfuse.lower.decisions import CPU, Choice, nominal
from normfuse.rewrite import Editor, Exactness, Transform, Value, computed

BLOCK = 16
"""Channels of a block: what is joined must be whole blocks."""
POINTWISE = (
    aten.relu, aten.relu6, aten.gelu, aten.silu, aten.sigmoid, aten.tanh, aten.hardswish, aten.hardtanh, aten.clamp,
    aten.leaky_relu, aten.elu,
)  # fmt: skip


def split_grouped(program: Program, facts: Facts, edit: Editor) -> None:
    """conv(x, w, groups) -> cat of depthwise convolutions, and the reader's weight with its input channels reordered."""
    choice: Choice = edit.choice
    if choice.provider != CPU:
        return
    for node in computed(program):
        per_group = _per_group(node)
        reader = _reader(node) if per_group > 1 else None
        if reader is None:
            continue
        kernel, side = nominal(shape(argument(node, "weight")))[-1], max(nominal(shape(node))[2:])
        size = (argument(node, "groups"), per_group, kernel, side)
        if choice.decide(edit, "grouped convolution", "Conv", "depthwise Conv and Concat", size=size) == "Conv":
            continue
        if edit.fire(node):
            _split(node, reader, per_group, edit)


RULE = Transform("split_grouped", split_grouped, exactness=Exactness.ALGEBRAIC)


def _per_group(node: fx.Node) -> int:
    """How many output channels each input channel has; 0 where that is not all there is to the convolution."""
    if not is_op(node, aten.conv2d):
        return 0
    weight, bias, groups = argument(node, "weight"), argument(node, "bias"), argument(node, "groups")
    if not _is_tensor(weight) or not (bias is None or _is_tensor(bias)) or shape(weight)[1] != 1 or groups % BLOCK:
        return 0
    return int(shape(weight)[0]) // int(groups)


def _reader(node: fx.Node) -> fx.Node | None:
    """The convolution over all channels that alone reads the node, with at most pointwise functions between."""
    current = node
    while len(current.users) == 1:
        before, current = current, next(iter(current.users))
        if is_op(current, *POINTWISE) and current.all_input_nodes == [before]:
            continue
        whole = is_op(current, aten.conv2d) and argument(current, "groups") == 1 and argument(current, "input") is before
        return current if whole and _is_tensor(argument(current, "weight")) else None
    return None


def _is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and is_weight(node)


def _split(node: fx.Node, reader: fx.Node, count: int, edit: Editor) -> None:
    def part(source: fx.Node | None, place: int) -> Value | None:
        return None if source is None else _every(source, 0, place, count, edit)

    with edit.at(node):
        weight, bias = argument(node, "weight"), argument(node, "bias")
        parts = [edit.rebuild(node, weight=part(weight, i), bias=part(bias, i)) for i in range(count)]
        edit.replace(node, edit.call(aten.cat.default, parts, 1))
    with edit.at(reader):
        weight = argument(reader, "weight")
        ordered = edit.call(aten.cat.default, [_every(weight, 1, place, count, edit) for place in range(count)], 1)
        edit.replace(reader, edit.rebuild(reader, weight=ordered))


def _every(weight: fx.Node, axis: int, place: int, count: int, edit: Editor) -> Value:
    """Every so-many-th entry along the axis, from this place on."""
    return edit.call(aten.slice.Tensor, weight, axis, place, sys.maxsize, count)
