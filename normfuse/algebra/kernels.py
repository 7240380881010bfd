"""From an affine map to its kernel and bias as weight programs, and to the one call that computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from normfuse.analysis.affine import AffineMap, Channelwise, Composed, Gathered, Identity, Own, Pool, Sum, Term
from normfuse.analysis.channelwise import constant_operand
from normfuse.analysis.grouped import Groups
from normfuse.analysis.windows import Placement, Window, Windows, placement
from normfuse.graph.node import argument, aten, is_op, op_name, rank, shape, value
from normfuse.rewrite.editor import Editor, Value

Factor = Value | float
"""A number, a tensor of one element, or one number per channel."""


def emit(edit: Editor, m: AffineMap, wanted: fx.Node) -> Value:
    """The map as one call: a convolution, a linear, an embedding, or a product and a sum where it is diagonal."""
    return call_with(edit, m, *build(edit, m), wanted)


def call_with(edit: Editor, m: AffineMap, kernel: Factor, bias: Factor | None, wanted: fx.Node) -> Value:
    """The call that moves as `m` does, with this kernel and bias, in the dtype of `wanted`."""
    source = edit.value(m.source)
    if m.diagonal:
        return _pointwise(edit, m, source, kernel, bias).to(value(wanted).dtype)
    assert isinstance(kernel, Value)
    if m.table:
        return _embedding(edit, m, source, kernel, bias).to(value(wanted).dtype)
    kernel = kernel.to(value(m.source).dtype)
    vector = None if bias is None else as_vector(edit, bias, kernel.shape[0], m.source).to(value(m.source).dtype)
    if not m.windows:
        return edit.op("linear", source, kernel, vector).to(value(wanted).dtype)
    pads = [w.low for w in m.windows]
    if any(w.low != w.high for w in m.windows):
        around = [p for w in reversed(m.windows) for p in (w.low, w.high)]
        source, pads = edit.call(aten.constant_pad_nd.default, source, around, 0), [0] * len(m.windows)
    strides, dilations = [w.stride for w in m.windows], [w.dilation for w in m.windows]
    conv = f"conv{len(m.windows)}d"
    return edit.op(conv, source, kernel, vector, strides, pads, dilations, m.groups).to(value(wanted).dtype)


def write_terms(edit: Editor, node: fx.Node, terms: Sequence[Term]) -> None:
    """Replace `node` by the sum of these terms: what was merged in one call each, any other as it is."""
    with edit.at(node):
        total: Value | None = None
        for term in terms:
            kept = None if term.map.merged else term.map.node
            part = emit(edit, term.map, node) if kept is None else edit.value(kept)
            part = part if term.factor == 1 else part * term.factor
            total = part if total is None else total + part
        assert total is not None
        edit.replace(node, total)


def ingredients(maps: Sequence[AffineMap]) -> str:
    """What maps are made of: `2 conv2d, batch_norm, add`."""
    names = Counter(op_name(n) for m in maps for n in sorted(m.covers))
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in names.items())


def _embedding(edit: Editor, m: AffineMap, source: Value, kernel: Value, bias: Factor | None) -> Value:
    table = kernel.transpose(0, 1)
    return edit.op("embedding", table if bias is None else table + bias, source)


def _pointwise(edit: Editor, m: AffineMap, source: Value, scale: Factor, shift: Factor | None) -> Value:
    ndim = rank(m.source)
    axis = ndim - 1 if m.axis is None else m.axis
    scaled = source if _is_one(scale) else source * _broadcast(scale, axis, ndim)
    return scaled if shift is None else scaled + _broadcast(shift, axis, ndim)


def build(edit: Editor, m: AffineMap) -> tuple[Factor, Factor | None]:
    """Kernel (outputs, inputs / groups, *taps), or the factor of a diagonal map, and the bias."""
    recipe = m.recipe
    if isinstance(recipe, Own):
        return _own(edit, recipe)
    if isinstance(recipe, Pool):
        taps = [w.size for w in m.windows]
        return _full(edit, [m.outputs, 1, *taps], 1.0 / recipe.divisor, recipe.node), None
    if isinstance(recipe, Gathered):
        return _gathering(edit, recipe.groups), None
    if isinstance(recipe, Channelwise):
        kernel, bias = build(edit, recipe.inner)
        scale, shift = scale_and_shift(edit, recipe.node, recipe.operand)
        return _scaled(kernel, scale), _plus(_times(bias, scale), shift)
    if isinstance(recipe, Composed):
        return _composed(edit, recipe.outer, recipe.inner, m)
    if isinstance(recipe, Sum):
        return _sum(edit, m, recipe.terms)
    assert isinstance(recipe, Identity)
    return 1.0, None


def _own(edit: Editor, recipe: Own) -> tuple[Value, Value | None]:
    found = recipe.projection
    if found is None:
        return edit.value(argument(recipe.node, "weight")).transpose(0, 1), None
    weight = edit.value(found.weight)
    bias = None if found.bias is None else edit.value(found.bias)
    return (weight if found.out_axis == 0 else weight.transpose(0, 1)), bias


def _gathering(edit: Editor, groups: Groups) -> Value:
    """The matrix (sums, channels) of ones where a channel belongs to a sum."""
    v, count, each = value(groups.source), groups.count, groups.each
    eye = edit.call(aten.eye.default, count, dtype=v.dtype, device=v.device)
    apart = [count, count, 1] if groups.neighbours else [count, 1, count]
    sizes = [count, count, each] if groups.neighbours else [count, each, count]
    repeated = edit.call(aten.expand.default, eye.reshape(*apart), sizes).reshape(count, count * each)
    return repeated if groups.factor == 1 else repeated * groups.factor


# -- scales and shifts -------------------------------------------------------------------------------------------------


def scale_and_shift(edit: Editor, node: fx.Node, operand: fx.Node) -> tuple[Factor, Factor | None]:
    """y = scale * operand + shift of one channelwise operator, as numbers or vectors over the channels."""
    if is_op(node, aten.batch_norm, aten.instance_norm):
        return frozen_norm(edit, node)
    if is_op(node, aten.neg):
        return -1.0, None
    if not is_op(node, aten.add, aten.sub, aten.rsub, aten.mul, aten.div):
        return 1.0, None
    first = argument(node, "self") is operand
    constant = _factor(edit, constant_operand(node, operand))
    if is_op(node, aten.mul):
        return constant, None
    if is_op(node, aten.div):
        return (edit.op("reciprocal", constant) if isinstance(constant, Value) else 1 / constant), None
    alpha = float(argument(node, "alpha") or 1)
    if is_op(node, aten.add):
        return (1.0, _times(constant, alpha)) if first else (alpha, constant)
    subtracts_source = is_op(node, aten.rsub) == first
    if subtracts_source:
        return -alpha, constant
    return 1.0, _times(constant, -alpha)


def frozen_norm(edit: Editor, node: fx.Node) -> tuple[Value, Value]:
    """BatchNorm or InstanceNorm by its running statistics: y = scale * x + shift."""
    names = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, var = (edit.value(p) if (p := argument(node, n)) is not None else None for n in names)
    assert mean is not None and var is not None
    scale = (var + float(argument(node, "eps"))).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -(mean * scale)
    return scale, (shift if beta is None else shift + beta)


def _factor(edit: Editor, constant: Any) -> Factor:
    if not isinstance(constant, fx.Node):
        return float(constant)
    wide = [int(s) for s in shape(constant) if s != 1]
    if rank(constant) <= 1 and bool(wide) == bool(rank(constant)):
        return edit.value(constant)
    return edit.value(constant).reshape(*wide)


def _is_one(factor: Factor | None) -> bool:
    return isinstance(factor, float) and factor == 1.0


def _times(a: Factor | None, b: Factor) -> Factor | None:
    if a is None or _is_one(b):
        return a
    if _is_one(a):
        return b
    return a * b if isinstance(a, Value) else b * a


def _plus(a: Factor | None, b: Factor | None) -> Factor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b if isinstance(a, Value) else b + a


def _broadcast(factor: Factor, axis: int, ndim: int) -> Factor:
    return factor if not isinstance(factor, Value) or not factor.ndim else factor.along(axis, ndim)


def _scaled(kernel: Factor, scale: Factor) -> Factor:
    """The outputs of a kernel (or of a diagonal map) multiplied."""
    if isinstance(kernel, Value) and kernel.ndim > 1:
        return kernel if _is_one(scale) else kernel * _broadcast(scale, 0, kernel.ndim)
    product = _times(kernel, scale)
    assert product is not None
    return product


def _full(edit: Editor, sizes: Sequence[int], fill: float, like: fx.Node) -> Value:
    v = value(like)
    return edit.call(aten.full.default, list(sizes), fill, dtype=v.dtype, device=v.device)


def as_vector(edit: Editor, factor: Factor, size: int, like: fx.Node) -> Value:
    """One number per channel."""
    if isinstance(factor, Value) and factor.ndim == 1 and factor.shape[0] == size:
        return factor
    return _full(edit, [size], 1.0, like) * factor


# -- composition -------------------------------------------------------------------------------------------------------


def _composed(edit: Editor, outer: AffineMap, inner: AffineMap, m: AffineMap) -> tuple[Factor, Factor | None]:
    (over, late), (under, early) = build(edit, outer), build(edit, inner)
    if outer.diagonal:
        return _scaled(under, over), _plus(_times(early, over), late)
    assert isinstance(over, Value)
    moved = None if early is None else through(edit, over, outer.groups, early, m.source)
    if inner.diagonal:
        kernel: Factor = over if _is_one(under) else scale_inputs(over, outer.groups, under)
    else:
        assert isinstance(under, Value)
        kernel = _product(edit, over, outer, under, inner, m.groups)
    return kernel, _plus(moved, late)


def scale_inputs(kernel: Value, groups: int, scale: Factor) -> Value:
    """K diag(scale): each input channel of a kernel multiplied."""
    if not isinstance(scale, Value) or not scale.ndim:
        return kernel * scale
    if groups == 1:
        return kernel * scale.along(1, kernel.ndim)
    outputs, inputs, *taps = kernel.shape
    split = kernel.reshape(groups, outputs // groups, inputs, math.prod(taps))
    return (split * scale.reshape(groups, 1, inputs, 1)).reshape(*kernel.shape)


def through(edit: Editor, kernel: Value, groups: int, shift: Factor, like: fx.Node) -> Value:
    """What a constant input, `shift` per channel, comes out as: K summed over its taps, times the shift."""
    outputs, inputs, *taps = kernel.shape
    if not isinstance(shift, Value) or not shift.ndim:
        return kernel.sum(list(range(1, kernel.ndim))) * shift
    if groups == 1:
        return (kernel * shift.along(1, kernel.ndim)).sum(list(range(1, kernel.ndim)))
    split = kernel.reshape(groups, outputs // groups, inputs, math.prod(taps))
    return (split * shift.reshape(groups, 1, inputs, 1)).sum([2, 3]).reshape(outputs)


def _product(edit: Editor, over: Value, outer: AffineMap, under: Value, inner: AffineMap, groups: int) -> Value:
    """The kernel of one projection after another; one of the two is pointwise."""
    over = block_diagonal(edit, over, outer.groups, groups)
    under = block_diagonal(edit, under, inner.groups, groups)
    outputs, middle, *taps = over.shape
    _, inputs, *inner_taps = under.shape
    a = over.reshape(groups, outputs // groups, middle, math.prod(taps))
    b = under.reshape(groups, middle, inputs, math.prod(inner_taps))
    product = edit.call(aten.einsum.default, "gomp,gmiq->goipq", [a, b])
    taps = [max(x, y) for x, y in zip(taps, inner_taps, strict=True)] if taps else []
    return product.reshape(outputs, inputs, *taps)


def block_diagonal(edit: Editor, kernel: Value, groups: int, wanted: int) -> Value:
    """A kernel of `groups` groups as one of `wanted` groups, a divisor: zeros between channels that did not meet."""
    if groups == wanted:
        return kernel
    each = groups // wanted
    outputs, inputs, *taps = kernel.shape
    v = value(kernel.node)
    eye = edit.call(aten.eye.default, each, dtype=v.dtype, device=v.device).reshape(1, each, 1, each, 1, 1)
    split = kernel.reshape(wanted, each, outputs // groups, 1, inputs, math.prod(taps))
    return (split * eye).reshape(outputs, each * inputs, *taps)


# -- sums --------------------------------------------------------------------------------------------------------------


def _sum(edit: Editor, m: AffineMap, terms: Sequence[Term]) -> tuple[Factor, Factor | None]:
    kernel: Factor | None = None
    bias: Factor | None = None
    for term in terms:
        part, shift = build(edit, term.map)
        if not m.diagonal:
            part = _in_frame(edit, part, term.map, m)
        kernel = _plus(kernel, _times(part, term.factor))
        bias = _plus(bias, _times(shift, term.factor))
    assert kernel is not None
    return kernel, bias


def _in_frame(edit: Editor, kernel: Factor, term: AffineMap, m: AffineMap) -> Value:
    """The kernel of one summand with the taps and the groups of the whole."""
    windows: Windows = term.windows or (Window(),) * len(m.windows)
    if term.diagonal:
        ones = _full(edit, [m.outputs, 1, *[1] * len(windows)], 1.0, m.source)
        kernel = _scaled(ones, kernel)
    assert isinstance(kernel, Value)
    dense = block_diagonal(edit, kernel, term.groups or m.inputs, m.groups)
    places = [placement(w, f) for w, f in zip(windows, m.windows, strict=True)]
    for axis, place in enumerate(places):
        dense = _dilated(edit, dense, 2 + axis, place.dilation)
    return _surrounded(edit, dense, places)


def _dilated(edit: Editor, kernel: Value, axis: int, dilation: int) -> Value:
    """Zeros between the taps of one axis."""
    if dilation == 1:
        return kernel
    sizes = list(kernel.shape)
    taps = sizes[axis]
    zeros = [0, 0] * (kernel.ndim - 1 - axis) + [0, dilation - 1]
    spread = edit.call(aten.constant_pad_nd.default, kernel.unsqueeze(axis + 1), zeros)
    sizes[axis] = taps * dilation
    return edit.call(aten.slice.Tensor, spread.reshape(*sizes), axis, 0, (taps - 1) * dilation + 1)


def _surrounded(edit: Editor, kernel: Value, places: Sequence[Placement]) -> Value:
    around = [n for place in reversed(places) for n in (place.before, place.behind)]
    return edit.call(aten.constant_pad_nd.default, kernel, around) if any(around) else kernel


__all__ = [
    "Factor", "as_vector", "block_diagonal", "build", "call_with", "emit", "frozen_norm", "ingredients",
    "scale_and_shift", "scale_inputs", "through", "write_terms",
]  # fmt: skip
