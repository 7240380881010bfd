"""Pushing a scale and a shift per channel through a graph: forward into the weights of all readers of a tensor, backward
into those of its writers.

`analysis.reach` and `analysis.written` say whose weights these are and how the numbers lie along them; here they get them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from normfuse.algebra.kernels import Factor, as_vector, build, scale_inputs, through
from normfuse.analysis.affine import AffineMap
from normfuse.analysis.gains import Gain
from normfuse.analysis.lanes import Among, Fill, Part, Step
from normfuse.analysis.projections import Projection
from normfuse.analysis.reach import End, Reach
from normfuse.analysis.signs import always_positive, nowhere_zero, positive_here
from normfuse.analysis.windows import windows_of
from normfuse.analysis.written import Writing, Written
from normfuse.graph.node import argument, aten, rank, shape, site, value
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite.editor import Editor, Value

Factors = tuple[Factor | None, Factor | None]
"""Scale and shift: numbers, or one number per channel."""
Border = Literal["map", "pad"]
"""Zeros around a shifted input: add the convolution of the shift alone, or pad what is read by what becomes zero."""


# -- what is pushed ----------------------------------------------------------------------------------------------------


def of_map(edit: Editor, m: AffineMap) -> Factors:
    """Scale and shift of a diagonal map."""
    return build(edit, m)


def of_gain(edit: Editor, gain: Gain) -> Factors:
    """Gain and shift of a norm, without the axes of one that broadcast them."""
    numbers = [_flat(edit.value(p)) if p is not None else None for p in (gain.weight, gain.bias)]
    return numbers[0], numbers[1]


def _flat(parameter: Value) -> Value:
    wide = [int(size) for size in parameter.shape if size != 1]
    return parameter if list(parameter.shape) == wide else parameter.reshape(*wide)


def laid(edit: Editor, factor: Factor | None, steps: Sequence[Step], neutral: float, size: int | None) -> Factor | None:
    """The numbers along an axis of `size` channels, of which those that they do not reach get the neutral one."""
    for step in steps:
        if isinstance(factor, Value) and factor.ndim:
            factor = _laid(edit, factor, step, neutral, size)
        elif isinstance(step, Fill | Among) and factor is not None and factor != neutral:
            factor = _spread(edit, factor, step, neutral, size)
    return factor


def _laid(edit: Editor, vector: Value, step: Step, neutral: float, size: int | None) -> Value:
    if isinstance(step, Part):
        return edit.op("slice", vector, 0, step.start, step.stop)
    if isinstance(step, Among):
        return edit.call(aten.constant_pad_nd.default, vector, [step.before, step.behind], neutral)
    if isinstance(step, Fill):
        return vector
    channels = int(vector.shape[0])
    inner = step.inner if step.inner is not None else (size or channels) // (channels * step.outer)
    if step.outer == inner == 1:
        return vector
    tall = edit.call(aten.expand.default, vector.reshape(1, channels, 1), [step.outer, channels, inner])
    return tall.reshape(step.outer * channels * inner)


def _spread(edit: Editor, number: Factor, step: Fill | Among, neutral: float, size: int | None) -> Factor:
    """One number as a vector, where it does not go to every channel."""
    if isinstance(step, Fill):
        return _vector(edit, number, step.count)
    assert size is not None
    return _laid(edit, _vector(edit, number, size - step.before - step.behind), step, neutral, size)


def _vector(edit: Editor, number: Factor, count: int) -> Value:
    if isinstance(number, Value):
        return edit.call(aten.expand.default, number.reshape(1), [count])
    return edit.call(aten.full.default, [count], number, dtype=torch.float64)


# -- forward -----------------------------------------------------------------------------------------------------------


def checked(edit: Editor, both: Factors, found: Reach, border: Border = "map") -> Factors | str:
    """The factors, if their values let them pass; or why not, where that depends on values and they say no."""
    scale, shift = both
    if found.positive_for is not None and scale is not None:
        positive = _positive(edit, scale, found.positive_for)
        if isinstance(positive, str):
            return positive
        scale = positive
    padded = border == "pad" and shift is not None and any(end.bordered for end in found.ends)
    if padded and scale is not None and not _nowhere_zero(edit, scale):
        return "a channel has a scale of zero: nothing around its input becomes zero"
    return scale, shift


def forward(edit: Editor, found: Reach, both: Factors, border: Border = "map") -> None:
    """Every reader does itself what scale and shift did to the tensor, and is ready to read it without."""
    scale, shift = both
    for end in found.ends:
        node = edit.current(end.node)
        mine = replace(end, projection=replace(end.projection, node=node))
        with edit.at(node):
            own = laid(edit, scale, end.steps, 1.0, end.inputs), laid(edit, shift, end.steps, 0.0, end.inputs)
            edit.replace(node, taken(edit, mine, *own, border))


def into_reader(edit: Editor, found: Projection, scale: Factor | None, shift: Factor | None) -> None:
    """The projection gives what it gave when its input was s * x + c, each a number per channel."""
    end = End(replace(found, node=edit.current(found.node)))
    with edit.at(end.node):
        edit.replace(end.node, taken(edit, end, scale, shift))


def _nowhere_zero(edit: Editor, scale: Factor) -> bool:
    """Of another checkpoint a zero becomes NaN by itself: it is divided by."""
    if not isinstance(scale, Value):
        return scale != 0
    return always_positive(scale.node) or bool(nowhere_zero(edit.program, scale.node))


def _positive(edit: Editor, scale: Factor, passing: fx.Node) -> Factor | str:
    """The scale, if it is positive. Where only the values say so, another checkpoint's negative one becomes NaN."""
    where = f"only a positive scale passes the maximum at {site(passing)}"
    if not isinstance(scale, Value):
        return scale if scale > 0 else where
    if always_positive(scale.node):
        return scale
    known = positive_here(edit.program, scale.node)
    if not known:
        return f"{where}, and " + ("there are no values to tell" if known is None else "a channel has a negative one")
    return edit.call(aten.where.ScalarOther, edit.call(aten.gt.Scalar, scale, 0), scale, math.nan)


# -- one reader --------------------------------------------------------------------------------------------------------


def taken(edit: Editor, end: End, scale: Factor | None, shift: Factor | None, border: Border = "map") -> Value:
    """W (s * x + c) + b = (W diag(s)) x + (b + W c); behind zeros, W c is another number at the border."""
    found = end.projection
    weight = edit.value(found.weight)
    scaled = weight if scale is None else _scaled(found, weight, scale).to(value(found.weight).dtype)
    changed: dict[str, Any] = {found.weight_name: scaled}
    if shift is None:
        return edit.rebuild(end.node, **changed)
    if end.bordered and border == "map":
        return edit.rebuild(end.node, **changed) + _bias_map(edit, end, shift)
    if end.bordered:
        changed |= _padded(edit, end, 1.0 if scale is None else scale, shift)
    moved = _moved(edit, found, weight, shift).to(value(found.weight).dtype)
    if found.bias_name is None:
        return edit.rebuild(end.node, **changed) + moved
    changed[found.bias_name] = moved if found.bias is None else edit.value(found.bias) + moved
    return edit.rebuild(end.node, **changed)


def _scaled(found: Projection, weight: Value, scale: Factor) -> Value:
    if found.in_axis != 0:
        return scale_inputs(weight, found.groups, scale)
    return weight * (scale.along(0, weight.ndim) if isinstance(scale, Value) and scale.ndim else scale)


def _moved(edit: Editor, found: Projection, weight: Value, shift: Factor) -> Value:
    canonical = weight if found.in_axis != 0 else weight.transpose(0, 1)
    return through(edit, canonical, found.groups, shift, found.node)


def _bias_map(edit: Editor, end: End, shift: Factor) -> Value:
    """What the convolution, with its zeros around, makes of the shift alone: one number per place of the output."""
    source: fx.Node = argument(end.node, end.projection.input_name)
    channels, *sizes = _sizes(edit, source)
    vector = as_vector(edit, shift, channels, source).reshape(1, channels, *[1] * len(sizes))
    constant = edit.call(aten.expand.default, vector, [1, channels, *sizes])
    made = edit.rebuild(end.node, **{end.projection.input_name: constant, "bias": None})
    return made.to(value(end.node).dtype)


def _padded(edit: Editor, end: End, scale: Factor, shift: Factor) -> dict[str, Any]:
    """The input with -c/s around it, of which scale and shift make the zeros that were there, and no further padding."""
    source: fx.Node = argument(end.node, end.projection.input_name)
    like, padding = value(source), argument(end.node, "padding")
    windows = windows_of(end.node, shape(end.projection.weight)[2:])
    assert windows is not None
    around = [p for window in reversed(windows) for p in (window.low, window.high)]
    channels, *sizes = _sizes(edit, source)
    zeros = edit.call(aten.full.default, [1, 1, *sizes], 0.0, dtype=like.dtype, device=like.device)
    outside = edit.call(aten.constant_pad_nd.default, zeros, around, 1.0)
    border = (as_vector(edit, shift, channels, source) / scale * -1.0).along(1, like.dim()).to(like.dtype)
    wide = edit.call(aten.constant_pad_nd.default, source, around, 0.0) + outside * border
    return {end.projection.input_name: wide, "padding": "valid" if isinstance(padding, str) else [0] * len(windows)}


def _sizes(edit: Editor, source: fx.Node) -> Sequence[int]:
    """Channels and sizes of an image; a free size is asked for at run time."""
    wanted = range(1, rank(source))
    known = shape(source)
    return [s if isinstance(s := known[axis], int) else edit.call(aten.sym_size.int, source, axis) for axis in wanted]  # type: ignore[misc]


# -- backward ----------------------------------------------------------------------------------------------------------


def backward(edit: Editor, found: Written, both: Factors) -> None:
    """Every writer writes what scale and shift make of it."""
    scale, shift = both
    for writing in found.writings:
        mine = replace(writing, node=edit.current(writing.node))
        own = laid(edit, scale, writing.steps, 1.0, writing.channels)
        moved = laid(edit, shift, writing.steps, 0.0, writing.channels) if writing.shifted else None
        with edit.at(mine.node if mine.reader is None else mine.reader):
            if mine.reader is None:
                edit.replace(mine.node, given(edit, mine, own, moved))
            else:
                weight = _times(edit.value(mine.node), own, mine.axis)
                edit.replace_input(mine.reader, mine.node, _plus(weight, moved, mine.axis).to(value(mine.node).dtype))


def given(edit: Editor, writing: Writing, scale: Factor | None, shift: Factor | None) -> Value:
    """The call of a writer that gives s * y + c where it gave y."""
    if writing.projection is not None:
        return _given_by_projection(edit, replace(writing.projection, node=writing.node), scale, shift)
    names = ("weight", None) if writing.gain is None else ("weight", "bias")
    weight, bias = edit.value(argument(writing.node, "weight")), argument(writing.node, "bias") if names[1] else None
    if names[1] is None:
        return edit.rebuild(writing.node, weight=_plus(_times(weight, scale, 1), shift, 1))
    changed: dict[str, Value] = {"weight": _gained(weight, scale)}
    if bias is not None:
        moved = _gained(edit.value(bias), scale)
        changed["bias"] = moved if shift is None else moved + _like(moved, shift)
    elif shift is not None:
        changed["bias"] = (weight * 0.0) + _like(weight, shift)
    return edit.rebuild(writing.node, **changed)


def _gained(parameter: Value, scale: Factor | None) -> Value:
    return parameter if scale is None else parameter * _like(parameter, scale)


def _like(parameter: Value, factor: Factor) -> Factor:
    """Numbers per channel in the shape of a norm's parameter, which may have axes of one behind."""
    vector = isinstance(factor, Value) and factor.ndim == 1 and parameter.ndim > 1
    return factor.reshape(*parameter.shape) if vector and isinstance(factor, Value) else factor


def _given_by_projection(edit: Editor, found: Projection, scale: Factor | None, shift: Factor | None) -> Value:
    weight = edit.value(found.weight)
    changed: dict[str, Any] = {found.weight_name: weight if scale is None else scale_outputs(weight, found, scale)}
    bias = None if found.bias is None else _times(edit.value(found.bias), scale, -1)
    if shift is not None:
        outputs = int(weight.shape[found.out_axis]) * (found.groups if found.out_axis else 1)
        bias = as_vector(edit, shift, outputs, found.weight) if bias is None else bias + shift
    if found.bias_name is None:
        out = edit.rebuild(found.node, **changed)
        return out if bias is None else out + bias.to(value(found.node).dtype)
    # A norm may be kept in float32 behind a projection in half precision.
    narrowed = {} if bias is None else {found.bias_name: bias.to(value(found.weight).dtype)}
    return edit.rebuild(found.node, **changed, **narrowed)


def scale_outputs(weight: Value, found: Projection, scale: Factor) -> Value:
    """diag(s) W: each output channel of a projection's weight multiplied."""
    if not isinstance(scale, Value) or not scale.ndim:
        return weight * scale
    if not is_a(found.node, Trait.TRANSPOSED) or found.groups == 1:
        return weight * scale.along(found.out_axis, weight.ndim)
    # Transposed: (in, out / groups, ...), output channel = group * (out / groups) + j.
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(found.groups, inputs // found.groups, outputs, *kernel)
    by_group = scale.reshape(found.groups, 1, outputs, *[1] * len(kernel))
    return (grouped * by_group).reshape(inputs, outputs, *kernel)


def _times(x: Value, factor: Factor | None, axis: int | None) -> Value:
    return x if factor is None else x * _along(factor, axis, x.ndim)


def _plus(x: Value, factor: Factor | None, axis: int | None) -> Value:
    return x if factor is None else x + _along(factor, axis, x.ndim)


def _along(factor: Factor, axis: int | None, ndim: int) -> Factor:
    vector = isinstance(factor, Value) and factor.ndim > 0 and axis is not None
    return factor.along(axis, ndim) if vector and isinstance(factor, Value) and axis is not None else factor
