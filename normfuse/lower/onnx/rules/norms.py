"""Norms as LayerNormalization and RMSNormalization, whatever axes, factors and dtypes they have; others as functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import fx

from normfuse.graph.node import argument, arguments, aten, dtype, is_op, rank, shape, value
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx import operators
from normfuse.lower.onnx.file.functions import derivable
from normfuse.ops import operator_of
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.ops.standardize import STANDARDIZE
from normfuse.rewrite import Editor, Value, each
from normfuse.rewrite.editor import constant

Spell = Callable[[Value, Value, Value | None, int, float], Value]
"""From input, gain, shift, first axis and eps to the norm."""


def lower_norm(node: fx.Node, edit: Editor) -> Value | None:
    """The norm as one operator or function; None for what is no norm."""
    choice: Choice = edit.choice
    if is_op(node, RMS_NORM):
        centred = choice.opset < 23 and bool(node.meta.get("zero_mean"))
        return _over(node, edit, _layer_norm(edit) if centred else _rms_norm(edit))
    if is_op(node, STANDARDIZE):
        return _standardize(node, edit)
    if is_op(node, aten.rms_norm):
        x, weight, eps = (argument(node, n) for n in ("input", "weight", "eps"))
        eps = torch.finfo(dtype(x)).eps if eps is None else eps  # type: ignore[arg-type]
        axes = range(-len(argument(node, "normalized_shape")), 0)
        return _call(edit, x, _gain(edit, x, weight, axes), None, axes[0], eps, _rms_norm(edit))
    if is_op(node, aten.layer_norm):
        x, weight, bias, eps = (argument(node, n) for n in ("input", "weight", "bias", "eps"))
        axes = range(-len(argument(node, "normalized_shape")), 0)
        return _call(edit, x, _gain(edit, x, weight, axes), bias, axes[0], eps, _layer_norm(edit))
    return _group_norm(node, edit) if is_op(node, aten.group_norm) else _function(node, edit)


def _function(node: fx.Node, edit: Editor) -> Value | None:
    """A known function that ONNX has no operator for, if its record gives a body; gain and shift stand behind it."""
    record = operator_of(node.target)
    if record is None or not record.alone:
        return None
    given, told = arguments(node), {record.arguments[0], "axes", record.gain, record.shift, record.eps}
    more = {name: option for name, option in given.items() if name not in told and option != record.defaults[name]}
    options = json.dumps(more, sort_keys=True, default=str)
    if any(isinstance(option, fx.Node) for option in more.values()) or not derivable(record, options):
        return None
    x = given[record.arguments[0]]
    axes, eps = record.axes_of(given, shape(x)), record.eps_of(given)
    wide, factors = dtype(x), [given[name] if name else None for name in (record.gain, record.shift)]
    for factor in factors:
        wide = wide if factor is None else torch.promote_types(wide, dtype(factor))  # type: ignore[arg-type]
    y = edit.call(operators.FUNCTION.default, edit.value(x).to(wide), record.stem, list(axes), eps or 0.0, options)  # type: ignore[arg-type]
    gain, shift = (None if f is None else _beside(edit.value(f).to(wide), axes, rank(x)) for f in factors)  # type: ignore[arg-type]
    y = y if gain is None else y * gain
    return (y if shift is None else y + shift).to(dtype(x))  # type: ignore[arg-type]


def _beside(factor: Value, axes: Sequence[int], ndim: int) -> Value:
    """A gain or shift over these axes, in a shape that broadcasts with the result."""
    if list(axes) == list(range(-len(axes), 0)):
        return factor
    sizes = dict(zip(axes, factor.shape, strict=True))
    return factor.reshape(*(sizes.get(a, 1) for a in range(-ndim, 0)))


def _group_norm(node: fx.Node, edit: Editor) -> Value:
    """Each group as one channel of an instance norm: GroupNormalization squares before it centres, and runs in pieces."""
    x, groups, eps = (argument(node, n) for n in ("input", "num_groups", "eps"))
    kind, sizes = dtype(x), shape(x)
    assert kind is not None
    name = f"{groups}_{str(kind).removeprefix('torch.')}"
    one = constant(edit.program, f"normfuse_ones_{name}", torch.ones(groups, dtype=kind))
    zero = constant(edit.program, f"normfuse_zeros_{name}", torch.zeros(groups, dtype=kind))
    flat = edit.call(operators.RESHAPE.default, x, [0, groups, -1])
    normed = edit.call(operators.INSTANCE_NORM.default, flat, one, zero, eps)
    if sum(not isinstance(s, int) for s in sizes[2:]) <= 1:
        y = edit.call(operators.RESHAPE.default, normed, [0, *(s if isinstance(s, int) else -1 for s in sizes[1:])])
    else:
        known = [s if isinstance(s, int) else edit.call(aten.sym_size.int, x, place) for place, s in enumerate(sizes)]
        y = normed.reshape(*known)
    column = [sizes[1]] + [1] * (len(sizes) - 2)
    if (weight := argument(node, "weight")) is not None:
        y = y * edit.value(weight).reshape(*column)
    bias = argument(node, "bias")
    return y if bias is None else y + edit.value(bias).reshape(*column)


def _layer_norm(edit: Editor) -> Spell:
    return partial(edit.call, operators.LAYER_NORM.default)


def _rms_norm(edit: Editor) -> Spell:
    return _unshifted(partial(edit.call, operators.RMS_NORM.default))


def _unshifted(norm: Callable[[Value, Value, int, float], Value]) -> Spell:
    """A norm that has no shift of its own: it is added."""

    def spell(x: Value, gain: Value, shift: Value | None, axis: int, eps: float) -> Value:
        y = norm(x, gain, axis, eps)
        return y if shift is None else y + shift

    return spell


def _standardize(node: fx.Node, edit: Editor) -> Value | None:
    """d / root(sum(d**2) / (n - k) + eps) is root(f) * d / root(mean(d**2) + f * eps) with f = (n - k) / n."""
    ddof, place, centre = argument(node, "ddof"), argument(node, "place"), argument(node, "centre")
    sizes = [value(argument(node, "x")).shape[a] for a in argument(node, "axes")]
    known = all(isinstance(s, int) for s in sizes)
    factor = 1.0 if not ddof else (prod(sizes) - ddof) / prod(sizes) if known else 0.0
    if place == "inside" and factor > 0:
        return _over(node, edit, _layer_norm(edit) if centre else _rms_norm(edit), factor)
    return _function(node, edit)


def _over(node: fx.Node, edit: Editor, spell: Spell, factor: float = 1.0) -> Value:
    """A norm over any axes: ONNX has them last."""
    bias, eps = argument(node, "bias"), argument(node, "eps")
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    axes = sorted(a % rank(x) - rank(x) for a in argument(node, "axes"))
    order = [a for a in range(-rank(x), 0) if a not in axes] + axes
    trailing = axes == list(range(-len(axes), 0))
    gain = _gain(edit, x, argument(node, "weight"), axes)
    if factor != 1.0:
        gain = gain * sqrt(factor)
    moved = edit.value(x) if trailing else edit.call(aten.permute.default, x, [a + rank(x) for a in order])
    y = _call(edit, moved.node, gain, bias, -len(axes), eps * factor, spell)
    back = [order.index(a) for a in range(-rank(x), 0)]
    return y if trailing else edit.call(aten.permute.default, y, back)


def _call(edit: Editor, x: fx.Node, gain: Value, bias: Any, axis: int, eps: float, spell: Spell) -> Value:
    """The result has the dtype of gain and bias in ONNX, which must be one: the wider; in torch it has that of x."""
    kinds = [dtype(n) for n in (x, gain.node, bias) if isinstance(n, fx.Node)]
    wide = kinds[0]
    for kind in kinds[1:]:
        wide = torch.promote_types(wide, kind)  # type: ignore[arg-type]
    assert wide is not None and kinds[0] is not None
    shift = None if bias is None else edit.value(bias).to(wide)
    return spell(edit.value(x).to(wide), gain.to(wide), shift, axis, eps).to(kinds[0])


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


RULE = each(lower_norm)
