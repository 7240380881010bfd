"""A convolution with one input channel and k outputs per group as k depthwise ones, where those are measured to be faster.

onnxruntime keeps depthwise convolutions in its blocked layout and takes others with groups out of it. The k results lie
side by side instead of interleaved: the convolution that reads them takes its input channels in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from normfuse.graph.node import argument, aten, is_op, shape
from normfuse.graph.program import Program
from normfuse.lower.decisions import CPU, Choice, nominal
from normfuse.rewrite import Editor
from normfuse.rewrite.editor import constant

BLOCK = 16
"""Channels of a block: what is joined must be whole blocks."""
POINTWISE = (
    aten.relu, aten.relu6, aten.gelu, aten.silu, aten.sigmoid, aten.tanh, aten.hardswish, aten.hardtanh, aten.clamp,
    aten.leaky_relu, aten.elu,
)  # fmt: skip


def split_grouped(program: Program, edit: Editor, choice: Choice) -> None:
    """conv(x, w, groups) -> cat of depthwise convolutions, and the reader's weight with its input channels reordered."""
    if choice.provider != CPU:
        return
    for node in list(program.graph.nodes):
        per_group = _per_group(node)
        reader = _reader(node) if per_group > 1 else None
        if reader is None:
            continue
        kernel, side = nominal(shape(argument(node, "weight")))[-1], max(nominal(shape(node))[2:])
        size = (argument(node, "groups"), per_group, kernel, side)
        if choice.decide("grouped convolution", "Conv", "depthwise Conv and Concat", size=size) == "Conv":
            continue
        _split(node, reader, per_group, edit)


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
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _split(node: fx.Node, reader: fx.Node, count: int, edit: Editor) -> None:
    program = edit.program

    def part(source: fx.Node | None, place: int) -> fx.Node | None:
        if source is None:
            return None
        name = str(source.target)
        return constant(program, f"{name}_{place}_of_{count}", program.tensors[name][place::count].contiguous(), like=name)

    with edit.at(node):
        weight, bias = argument(node, "weight"), argument(node, "bias")
        parts = [edit.rebuild(node, weight=part(weight, i), bias=part(bias, i)) for i in range(count)]
        edit.replace(node, edit.call(aten.cat.default, parts, 1))
    with edit.at(reader):
        name = str(argument(reader, "weight").target)
        ordered = constant(program, f"{name}_{reader.name}_order", _ordered(program.tensors[name], count), like=name)
        edit.replace(reader, edit.rebuild(reader, weight=ordered))


def _ordered(weight: Tensor, count: int) -> Tensor:
    """The weight for inputs that lie by their place in the group first."""
    return torch.cat([weight[:, place::count] for place in range(count)], 1)
