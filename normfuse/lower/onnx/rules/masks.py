"""Masks that depend on sizes alone: open to everything, or the causal triangle, however they are written."""

from __future__ import annotations

from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.masks import mask_kind
from normfuse.graph.node import argument, aten, expression, is_op, same_size, shape
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform, computed


def recognise_masks(program: Program, facts: Facts, edit: Editor) -> None:
    """A mask that lets everything through is none; the triangle is is_causal=True: both proved by evaluating the mask."""
    known: dict[fx.Node, str] = {}
    for node in computed(program):
        mask = argument(node, "attn_mask") if is_op(node, aten.scaled_dot_product_attention) else None
        if mask is None or argument(node, "is_causal"):
            continue
        rows, columns = (shape(argument(node, name))[-2] for name in ("query", "key"))
        if mask not in known:
            known[mask] = mask_kind(program, mask, expression(rows))
        triangle = known[mask] == "triangle"
        if (known[mask] == "open" or (triangle and same_size(rows, columns))) and edit.fire(node):
            with edit.at(node):
                edit.replace(node, edit.rebuild(node, attn_mask=None, is_causal=triangle))


RULE = Transform("recognise_masks", recognise_masks, exactness=Exactness.ALGEBRAIC)
