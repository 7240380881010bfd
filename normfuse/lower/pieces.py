"""Operators of ours that no other rule has lowered, in torch's own."""

from __future__ import annotations

from torch import fx

from normfuse.rewrite import Editor, Value, each
from normfuse.rewrite.decompose import decompose as reference


def decompose(node: fx.Node, edit: Editor) -> Value | None:
    """The reference of an operator of ours, in its place."""
    return reference(node, edit) if getattr(node.target, "namespace", "") == "normfuse" else None


RULE = each(decompose)
