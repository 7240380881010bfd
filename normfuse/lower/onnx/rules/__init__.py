"""Lowering rules: regions that ONNX has one operator for become a call of it."""

from __future__ import annotations

from normfuse.lower import pieces
from normfuse.lower.onnx.rules import (
    adaptive_pool,
    attention,
    attention_bias,
    attention_pieces,
    depthwise,
    experts,
    gates,
    linear,
    masks,
    norms,
    outputs,
    rows,
    simplify,
)
from normfuse.rewrite import Rule

TABLE: tuple[Rule, ...] = (
    *simplify.EARLY,
    adaptive_pool.RULE,
    experts.RULE,
    linear.UNFLATTEN,
    masks.RULE,
    attention.RULE,
    attention_bias.RULE,
    attention_pieces.RULE,
    depthwise.RULE,
    gates.RULE,
    linear.LINEAR,
    rows.RULE,
    norms.RULE,
    pieces.RULE,
    *simplify.VIEWS,
    *simplify.LATE,
    outputs.RULE,
)
"""Every rule for ONNX, in the order in which they run."""
