"""Putting a canonical operator in the place of what was found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph.node import aten, is_one, is_op, rank, same_size, shape, value
from normfuse.graph.roles import is_view
from normfuse.ops import operator_named
from normfuse.ops.traits import Trait, is_a
from normfuse.recognise.rows.choose import Plan
from normfuse.recognise.rows.family import Activation, Softmax, Squashed
from normfuse.recognise.rows.regions import Region
from normfuse.recognise.rows.standardize import Factor
from normfuse.rewrite import Editor, Value


def can_emit(plan: Plan, region: Region) -> bool:
    """Can everything that the plan names be had where the operator will stand?"""
    if plan.target == "none":
        return False
    if plan.target in ("group_norm", "instance_norm") and not _grouped_fits(plan):
        return False
    if plan.parts is not None and plan.target == "group_norm" and plan.parts[0] == -1:
        return False
    for factor in (plan.times, plan.plus):
        if factor is not None and not _broadcasts(factor, region):
            return False
    inside = {plan.channel} if plan.target in ("group_norm", "instance_norm") else set(plan.rows.axes)
    factors = [f for f in (plan.weight, plan.bias) if f is not None]
    return all(_parameter_sizes(f, sorted(inside), region) is not None for f in factors)


def emit_norm(plan: Plan, region: Region, root: fx.Node, edit: Editor) -> Value:
    """The operator of the plan on the region's source, in the dtype of the root."""
    source = _in_dtype(region.source, root, edit)
    weight, bias = (_parameter(f, plan, region, source, edit) for f in (plan.weight, plan.bias))
    result = _in_parts(plan, source, edit) if _is_split(plan) else _call(plan, source, weight, bias, edit)
    if plan.constant != 1.0:
        result = result * plan.constant
    if plan.times is not None:
        result = result * _behind(plan.times, region, edit)
    if plan.plus is not None:
        result = result + _behind(plan.plus, region, edit)
    return result.to(value(root).dtype)


def _call(plan: Plan, x: Value, weight: Value | None, bias: Value | None, edit: Editor) -> Value:
    axes = list(plan.axes)
    if plan.target == "layer_norm":
        sizes = [int(s) for s in shape(x.node)[x.ndim - len(axes) :]]
        return edit.call(aten.layer_norm.default, x, sizes, weight, bias, plan.eps)
    if plan.target in ("group_norm", "instance_norm"):
        return _grouped(plan, x, weight, bias, edit)
    record = operator_named(plan.target)
    factors = () if record.gain is None else (weight, bias)
    told = {"eps": plan.eps, "place": plan.place, "centre": plan.kind != "rms_norm", "ddof": plan.ddof}
    return edit.op(plan.target, x, axes, *factors, **{name: told[name] for name in told if name in record.arguments})


def _is_split(plan: Plan) -> bool:
    return plan.rows.split is not None and plan.target != "group_norm"


def _in_parts(plan: Plan, x: Value, edit: Editor) -> Value:
    """Rows that hold a part of an axis: the axis in two, the norm, the axis in one again."""
    axis = plan.rows.split
    assert axis is not None
    parts = edit.call(aten.unflatten.int, x, axis, list(plan.parts or (plan.rows.parts, plan.rows.length)))
    return edit.call(aten.flatten.using_ints, _call(plan, parts, None, None, edit), axis, axis + 1)


def _grouped(plan: Plan, x: Value, weight: Value | None, bias: Value | None, edit: Editor) -> Value:
    """torch wants the channels along axis 1, and everything behind them normalised."""
    moved = plan.channel != 1
    if moved:
        x = moved_axis(x, plan.channel, 1, edit)
    if plan.target == "instance_norm":
        y = edit.call(aten.instance_norm.default, x, weight, bias, None, None, True, 0.0, plan.eps, False)
    else:
        y = edit.call(aten.group_norm.default, x, plan.rows.parts, weight, bias, plan.eps, False)
    return moved_axis(y, 1, plan.channel, edit) if moved else y


def moved_axis(x: Value, source: int, destination: int, edit: Editor) -> Value:
    """The axis in another place, spelt as the passes know it: a permutation."""
    order = [a for a in range(x.ndim) if a != source]
    order.insert(destination, source)
    return edit.call(aten.permute.default, x, order)


def _grouped_fits(plan: Plan) -> bool:
    """Rows must hold all axes but the first and (in part) the channels."""
    others = {a for a in range(1, len(plan.rows.shape)) if a != plan.channel}
    mine = set(plan.rows.axes) - ({plan.channel} if plan.target == "group_norm" else set())
    return mine == others and plan.channel >= 1


def _in_dtype(source: fx.Node, root: fx.Node, edit: Editor) -> Value:
    """A result that is wider than the source was computed wider."""
    have, want = value(source).dtype, value(root).dtype
    x = edit.value(source)
    return x.to(want) if torch.finfo(want).bits > torch.finfo(have).bits else x


# -- parameters ---------------------------------------------------------------------------------------------------


def _sizes(axes: list[int], region: Region) -> list[int] | None:
    sizes = [shape(region.source)[a] for a in axes]
    return [int(s) for s in sizes] if all(isinstance(s, int) for s in sizes) else None


def _parameter_sizes(factor: Factor, axes: list[int], region: Region) -> list[int] | None:
    """Sizes of the source or, where that leaves its only axis free, of the parameter itself."""
    sizes = _sizes(axes, region)
    if sizes is not None or len(axes) != 1 or factor.side is None:
        return sizes
    own = [s for s in shape(region.sides[factor.side]) if not is_one(s)]
    return [int(own[0])] if len(own) == 1 and isinstance(own[0], int) else None


def _parameter(factor: Factor | None, plan: Plan, region: Region, x: Value, edit: Editor) -> Value | None:
    """A gain or shift with one entry for each position along the axes that the operator wants it on."""
    if factor is None:
        return None
    axes = [plan.channel] if plan.target in ("group_norm", "instance_norm") else sorted(plan.rows.axes)
    sizes = _parameter_sizes(factor, axes, region)
    assert sizes is not None and factor.side is not None
    side = stripped(region.sides[factor.side], value(x.node).dtype)
    new = edit.value(side)
    if list(factor.axes) != axes:
        thin = [s if a in factor.axes else 1 for a, s in zip(axes, sizes, strict=True)]
        new = edit.call(aten.expand.default, _shaped(new, thin), sizes)
    return _scaled(_shaped(new, sizes), factor)


def _behind(factor: Factor, region: Region, edit: Editor) -> Value:
    """A factor that broadcasts with the result."""
    assert factor.side is not None
    node = region.sides[factor.side]
    new = edit.value(node)
    ndim = rank(region.source)
    if not _aligned(node, factor, region) and factor.axes:
        new = _shaped(new, [shape(region.source)[a] if a in factor.axes else 1 for a in range(ndim)])
    return _scaled(new, factor)


def _broadcasts(factor: Factor, region: Region) -> bool:
    if factor.side is None:
        return False
    node = region.sides[factor.side]
    return not factor.axes or _aligned(node, factor, region) or _sizes(list(factor.axes), region) is not None


def _aligned(node: fx.Node, factor: Factor, region: Region) -> bool:
    """Does the side broadcast with the source along just the axes that the factor varies over?"""
    mine, theirs = shape(node), shape(region.source)
    if len(mine) > len(theirs):
        return False
    padded = (1,) * (len(theirs) - len(mine)) + tuple(mine)
    return all(
        same_size(a, b) if i in factor.axes else (isinstance(a, int) and a == 1) or same_size(a, b)
        for i, (a, b) in enumerate(zip(padded, theirs, strict=True))
    )


def _shaped(new: Value, sizes: list[Any]) -> Value:
    same = len(new.shape) == len(sizes) and all(same_size(a, b) for a, b in zip(new.shape, sizes, strict=True))
    return new if same else new.reshape(*sizes)


def _scaled(new: Value, factor: Factor) -> Value:
    if factor.scale != 1.0:
        new = new * factor.scale
    return new if factor.offset == 0.0 else new + factor.offset


def stripped(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The weight behind views that keep all of its elements in order, and behind a cast from `dtype`."""
    while node.op == "call_function":
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or not isinstance(value(source), Tensor):
            return node
        keeps_order = is_view(node) and not is_a(node, Trait.PERMUTE)
        whole = keeps_order and value(node).numel() == value(source).numel()
        widened = is_op(node, aten.to, aten._to_copy, aten.type_as) and value(source).dtype == dtype
        if not whole and not (widened and value(source).is_floating_point()):
            return node
        node = source
    return node


# -- the rest of the family ---------------------------------------------------------------------------------------


def emit_softmax(found: Softmax, region: Region, root: fx.Node, edit: Editor) -> Value:
    x = _in_dtype(region.source, root, edit)
    if found.kind == "logsumexp":
        return edit.call(aten.logsumexp.default, x, [found.axis], found.keepdim).to(value(root).dtype)
    assert found.rows is not None
    if found.scale != 1.0:
        x = x * found.scale
    axes = [a - len(found.rows.shape) for a in found.rows.axes]
    if len(axes) > 1:
        y = edit.op("softmax_over", x, axes)
    else:
        target = aten.softmax.int if found.kind == "softmax" else aten.log_softmax.int
        y = edit.call(target, x, axes[0])
    return y.to(value(root).dtype)


def emit_pointwise(found: Activation | Squashed, region: Region, root: fx.Node, edit: Editor) -> Value | None:
    x = _in_dtype(region.source, root, edit)
    if isinstance(found, Activation):
        if found.kind == "silu":
            y = edit.call(aten.silu.default, x)
        else:
            y = edit.call(aten.gelu.default, x, approximate=found.variant)
        return y.to(value(root).dtype)
    factors = (found.alpha, found.offset, found.gain, found.shift)
    if any(f is not None and f.side is not None and not _broadcasts(f, region) for f in factors):
        return None
    alpha, offset, gain, shift = (_loose(f, region, x, edit) for f in factors)
    number = found.gain.scale if found.gain.side is None else 1.0
    given = (x, alpha, offset, gain, shift) if found.kind == "derf" else (x, alpha, gain, shift)
    y = edit.op(found.kind, *given)
    return (y if number == 1.0 else y * number).to(value(root).dtype)


def _loose(factor: Factor | None, region: Region, x: Value, edit: Editor) -> Value | None:
    """A parameter in any shape that broadcasts."""
    if factor is None or factor.side is None:
        return None
    node = stripped(region.sides[factor.side], value(x.node).dtype)
    last = rank(region.source) - 1
    if (factor.axes == (last,) and rank(node) == 1) or not factor.axes:
        return _scaled(edit.value(node), factor)
    return _behind(factor, region, edit)
