"""Tensors that the ONNX form adds to a program."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from normfuse.program import Origin, Program


def constant(program: Program, name: str, tensor: Tensor, *, like: str = "") -> fx.Node:
    """A tensor of the form's own, once per name; a parameter if it is made of one."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node  # type: ignore[no-any-return]
        if node.op == "call_function":
            break
    origin = program.origins.get(like)
    program.tensors[name] = tensor
    program.origins[name] = Origin((name,), origin.kind if origin else "buffer")
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        node = program.graph.create_node("get_attr", name, (), {}, name=name.replace(".", "_"))
    with program.fake_mode:
        node.meta = {"val": torch.empty(tensor.shape, dtype=tensor.dtype), "site_name": name}
    return node
