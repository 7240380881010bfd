"""Lowering to a plain torch graph: aten operators alone, on any device.

`plain` is what a program computes, the same for every device. `fastest` may print a norm otherwise where the device has
a faster kernel for the same function: torch's CPU layer_norm is one fused pass, its CPU rms_norm is several.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.graph.node import argument, aten, is_op, rank, value
from normfuse.graph.program import Program
from normfuse.lower import pieces
from normfuse.lower.target import Target
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.rewrite import Editor, Rule, Value, each
from normfuse.rewrite.record import FiringKey, Log


def plain(program: Program, excluded: frozenset[FiringKey] = frozenset()) -> Program:
    """The program with every operator of ours replaced by torch's own."""
    return torch_target().form(program, Log(excluded=excluded))


def fastest(program: Program, device: torch.device, excluded: frozenset[FiringKey] = frozenset()) -> Program:
    """`plain`, with the spelling of each norm that is fastest on `device`, and device literals moved there."""
    lowered = torch_target(device).form(program, Log(excluded=excluded))
    _move_literals(lowered, device)
    return lowered


def device_of(program: Program) -> torch.device:
    """Where its weights are."""
    return next((t.device for t in program.tensors.values()), torch.device("cpu"))


def torch_target(device: torch.device | None = None) -> Target:
    """Graphs of torch's own operators, for this device or for any."""
    return Target("torch", TABLE, graph_module, device)


def zero_mean_as_layer_norm(node: fx.Node, edit: Editor) -> Value | None:
    """rms_norm of what has no mean is layer_norm, which a CPU has one kernel for."""
    device: torch.device | None = edit.choice
    if device is None or device.type != "cpu" or not is_op(node, RMS_NORM) or not node.meta.get("zero_mean"):
        return None
    sizes = _trailing(node)
    given = (argument(node, name) for name in ("weight", "bias", "eps"))
    return None if sizes is None else edit.call(aten.layer_norm.default, node.args[0], sizes, *given)


def trailing_rms_norm(node: fx.Node, edit: Editor) -> Value | None:
    """Over trailing axes torch has the operator; a shift follows it."""
    sizes = _trailing(node) if is_op(node, RMS_NORM) else None
    if sizes is None:
        return None
    gain, shift, eps = (argument(node, name) for name in ("weight", "bias", "eps"))
    scaled = edit.call(aten.rms_norm.default, node.args[0], sizes, gain, eps)
    return scaled if shift is None else scaled + edit.value(shift)


TABLE: tuple[Rule, ...] = (each(zero_mean_as_layer_norm), each(trailing_rms_norm), pieces.RULE)


def _trailing(node: fx.Node) -> list[int] | None:
    """The sizes of the last axes, where those are all that the norm is over, and known."""
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    axes = list(argument(node, "axes"))
    sizes = [s for s in value(x).shape[rank(x) - len(axes) :] if isinstance(s, int)]
    return sizes if axes == list(range(-len(axes), 0)) and len(sizes) == len(axes) else None


def _move_literals(program: Program, device: torch.device) -> None:
    """`arange(..., device=cpu)` was right where the model was captured."""
    if not any(t.device.type != "meta" for t in program.tensors.values()):
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
