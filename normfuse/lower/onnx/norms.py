"""Norms as LayerNormalization and RMSNormalization, whatever axes, factors and dtypes they come with."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import fx

from normfuse.lower.onnx import operators
from normfuse.lower.onnx.choice import Choice
from normfuse.lower.onnx.tensors import constant
from normfuse.node import argument, aten, dtype, is_op, rank, value
from normfuse.ops import RMS_NORM, STANDARDIZE
from normfuse.rewrite import Editor, Value


def lower_norm(node: fx.Node, edit: Editor, choice: Choice) -> Value | None:
    """The norm as one operator; None for what is no norm, or one that ONNX cannot say."""
    if is_op(node, RMS_NORM):
        centred = choice.opset < 23 and bool(node.meta.get("zero_mean"))
        return _over(node, edit, centre=centred)
    if is_op(node, STANDARDIZE):
        return _standardize(node, edit)
    if is_op(node, aten.rms_norm):
        x, weight, eps = (argument(node, n) for n in ("input", "weight", "eps"))
        eps = torch.finfo(dtype(x)).eps if eps is None else eps  # type: ignore[arg-type]
        axes = range(-len(argument(node, "normalized_shape")), 0)
        return _call(edit, x, _gain(edit, x, weight, axes), None, axes[0], eps, centre=False)
    if is_op(node, aten.layer_norm):
        x, weight, bias, eps = (argument(node, n) for n in ("input", "weight", "bias", "eps"))
        axes = range(-len(argument(node, "normalized_shape")), 0)
        return _call(edit, x, _gain(edit, x, weight, axes), bias, axes[0], eps, centre=True)
    return None


def _standardize(node: fx.Node, edit: Editor) -> Value | None:
    """d / root(sum(d**2) / (n - k) + eps) is root(f) * d / root(mean(d**2) + f * eps) with f = (n - k) / n."""
    ddof = argument(node, "ddof")
    sizes = [value(argument(node, "x")).shape[a] for a in argument(node, "axes")]
    if argument(node, "place") != "inside" or (ddof and not all(isinstance(s, int) for s in sizes)):
        return None
    factor = (prod(sizes) - ddof) / prod(sizes) if ddof else 1.0
    return _over(node, edit, centre=argument(node, "centre"), factor=factor) if factor > 0 else None


def _over(node: fx.Node, edit: Editor, *, centre: bool, factor: float = 1.0) -> Value:
    """A norm over any axes: ONNX has them last."""
    x, weight, bias, eps = (argument(node, n) for n in ("x", "weight", "bias", "eps"))
    axes = sorted(argument(node, "axes"))
    order = [a for a in range(-rank(x), 0) if a not in axes] + axes
    trailing = axes == list(range(-len(axes), 0))
    gain = _gain(edit, x, weight, axes)
    if factor != 1.0:
        gain = gain * sqrt(factor)
    moved = edit.value(x) if trailing else edit.call(aten.permute.default, x, [a + rank(x) for a in order])
    y = _call(edit, moved.node, gain, bias, -len(axes), eps * factor, centre=centre)
    back = [order.index(a) for a in range(-rank(x), 0)]
    return y if trailing else edit.call(aten.permute.default, y, back)


def _call(edit: Editor, x: fx.Node, gain: Value, bias: Any, axis: int, eps: float, *, centre: bool) -> Value:
    """The result has the dtype of gain and bias in ONNX, which must be one: the wider; in torch it has that of x."""
    kinds = [dtype(n) for n in (x, gain.node, bias) if isinstance(n, fx.Node)]
    wide = kinds[0]
    for kind in kinds[1:]:
        wide = torch.promote_types(wide, kind)  # type: ignore[arg-type]
    assert wide is not None and kinds[0] is not None
    gain = gain.to(wide)
    shift = None if bias is None else edit.value(bias).to(wide)
    given = edit.value(x).to(wide)
    if centre:
        return edit.call(operators.LAYER_NORM.default, given, gain, shift, axis, eps).to(kinds[0])
    y = edit.call(operators.RMS_NORM.default, given, gain, axis, eps)
    return (y if shift is None else y + shift).to(kinds[0])


def _gain(edit: Editor, x: fx.Node, weight: Any, axes: Sequence[int]) -> Value:
    """The gain that ONNX wants even where the model has none."""
    if weight is not None:
        return edit.value(weight)
    sizes: list[Any] = [value(x).shape[a] for a in axes]
    kind = dtype(x)
    assert kind is not None
    if not all(isinstance(s, int) for s in sizes):
        free = [s if isinstance(s, int) else edit.call(aten.sym_size.int, x, a) for s, a in zip(sizes, axes, strict=True)]
        return edit.call(aten.ones.default, free, dtype=kind)
    name = f"normfuse_ones_{'x'.join(str(s) for s in sizes)}_{str(kind).removeprefix('torch.')}"
    return edit.value(constant(edit.program, name, torch.ones(sizes, dtype=kind)))
