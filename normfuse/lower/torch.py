"""Lowering to a plain torch graph: aten operators alone, on any device.

`plain` is what a program computes, the same for every device. `fastest` may print a norm otherwise where the device has
a faster kernel for the same function: torch's CPU layer_norm is one fused pass, its CPU rms_norm is several.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.graph.node import argument, aten, is_op, operand, rank, value
from normfuse.graph.program import Program
from normfuse.graph.structure import check_structure
from normfuse.ops.norms import RMS_NORM
from normfuse.rewrite import Editor, Log, Value
from normfuse.rewrite.decompose import decompose


def plain(program: Program) -> Program:
    """The program with every operator of ours replaced by torch's own."""
    return _lower(program.copy(), zero_mean_as_layer_norm=False)


def fastest(program: Program, device: torch.device) -> Program:
    """`plain`, with the spelling of each norm that is fastest on `device`, and device literals moved there."""
    lowered = _lower(program.copy(), zero_mean_as_layer_norm=device.type == "cpu")
    _move_literals(lowered, device)
    return lowered


def _lower(program: Program, *, zero_mean_as_layer_norm: bool) -> Program:
    edit = Editor(program, "lower", Log())
    for node in list(program.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "normfuse":
            continue
        with edit.at(node):
            new = _rms_norm(node, edit, zero_mean_as_layer_norm) if is_op(node, RMS_NORM) else None
            edit.replace(node, new if new is not None else decompose(node, edit))
    program.drop_dead()
    check_structure(program, after="lowering to torch")
    return program


def _rms_norm(node: fx.Node, edit: Editor, zero_mean_as_layer_norm: bool) -> Value | None:
    """Over trailing axes torch has the operator; a shift follows it."""
    x = operand(node)
    axes, gain, shift, eps = (argument(node, name) for name in ("axes", "weight", "bias", "eps"))
    if list(axes) != list(range(-len(axes), 0)):
        return None
    sizes = [s if isinstance(s, int) else None for s in value(x).shape[rank(x) - len(axes) :]]
    if None in sizes:
        return None
    if zero_mean_as_layer_norm and node.meta.get("zero_mean"):
        return edit.call(aten.layer_norm.default, x, sizes, gain, shift, eps)
    scaled = edit.call(aten.rms_norm.default, x, sizes, gain, eps)
    return scaled if shift is None else scaled + edit.value(shift)


def _move_literals(program: Program, device: torch.device) -> None:
    """`arange(..., device=cpu)` was right where the model was captured."""
    tensors = [t for t in program.tensors.values() if t.device.type != "meta"]
    if not tensors:
        return
    for node in program.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device) and node.kwargs["device"] != device:
            node.kwargs = {**node.kwargs, "device": device}


def graph_module(program: Program, codegen: Any = None) -> fx.GraphModule:
    """The program as a GraphModule with its tensors as parameters and buffers under their qualified names.

    Without `codegen` it takes and returns flat leaves.
    """
    root = nn.Module()
    for name, tensor in program.tensors.items():
        _attach(root, name, tensor, program)
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    copies = zip(program.graph.nodes, graph.nodes, strict=True)
    for old, new in copies:
        new.meta = dict(old.meta)
    if codegen is not None:
        graph.set_codegen(codegen)
    module = fx.GraphModule(root, graph, "NormfuseProgram")
    for name, origin in program.origins.items():
        if origin.kind != "parameter" and not origin.persistent:
            path, _, last = name.rpartition(".")
            module.get_submodule(path)._non_persistent_buffers_set.add(last)
    return module.eval()


def _attach(root: nn.Module, name: str, tensor: Tensor, program: Program) -> None:
    *path, last = name.split(".")
    owner: nn.Module = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if program.origins[name].kind == "parameter" and (tensor.is_floating_point() or tensor.is_complex()):
        owner.register_parameter(last, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        owner.register_buffer(last, tensor)
