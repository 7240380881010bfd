"""Masks that depend on sizes alone: open to everything, or the causal triangle, however they are written."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.analysis.masks import mask_kind
from normfuse.graph.node import argument, aten, expression, is_op, same_size, shape
from normfuse.graph.program import Program
from normfuse.rewrite import Editor


def recognise_masks(program: Program, edit: Editor) -> None:
    """A mask that lets everything through is none; the triangle is is_causal=True: both proved by evaluating the mask."""
    known: dict[fx.Node, str] = {}
    for node in list(program.graph.nodes):
        mask = argument(node, "attn_mask") if is_op(node, aten.scaled_dot_product_attention) else None
        if mask is None or argument(node, "is_causal"):
            continue
        rows, columns = (shape(argument(node, name))[-2] for name in ("query", "key"))
        if mask not in known:
            known[mask] = mask_kind(program, mask, expression(rows))
        if known[mask] == "open" or (known[mask] == "triangle" and same_size(rows, columns)):
            with edit.at(node):
                edit.replace(node, edit.rebuild(node, attn_mask=None, is_causal=known[mask] == "triangle"))


def closes_no_row(node: fx.Node, program: Program) -> bool:
    """Does the mask of an Attention leave each row something? A finite one does, and the triangle alone: its first key."""
    mask = argument(node, "mask")
    if mask is None:
        return True
    tensor = program.tensors[str(mask.target)] if mask.op == "get_attr" else None
    if argument(node, "causal") or tensor is None or not tensor.is_floating_point():
        return False
    return bool(torch.isfinite(tensor).all())
