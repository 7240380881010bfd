"""Putting a scale and a shift of the channels of a tensor into the weights of those who read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import fx

from normfuse.algebra.kernels import Factor, as_vector, build, scale_inputs, through
from normfuse.analysis.affine import AffineMap, windows_of
from normfuse.analysis.projections import Projection
from normfuse.analysis.reach import End, Reach
from normfuse.analysis.signs import always_positive, nowhere_zero, positive_here
from normfuse.graph.node import argument, aten, rank, shape, site, value
from normfuse.rewrite.editor import Editor, Value

Factors = tuple[Factor, Factor | None]
Border = Literal["map", "pad"]
"""Zeros around a shifted input: add the convolution of the shift alone, or pad what is read by what becomes zero."""


def factors(edit: Editor, m: AffineMap, found: Reach, border: Border = "map") -> Factors | str:
    """Scale and shift of a diagonal map for its readers; or why not, if that depends on values and they say no."""
    with edit.at(found.ends[0].node):
        scale, shift = build(edit, m)
        checked = scale if found.positive_for is None else _positive(edit, scale, found.positive_for)
        padded = border == "pad" and shift is not None and any(end.bordered for end in found.ends)
        if padded and not _nowhere_zero(edit, scale):
            return "a channel has a scale of zero: nothing around its input becomes zero"
        return checked if isinstance(checked, str) else (checked, shift)


def fold_forward(edit: Editor, node: fx.Node, m: AffineMap, found: Reach, both: Factors, border: Border = "map") -> None:
    """Let every reader of `node` read what `m`, a diagonal map, reads, and do itself what `m` does."""
    scale, shift = both
    for end in found.ends:
        with edit.at(end.node):
            mine = _repeated(edit, scale, end), _repeated(edit, shift, end)
            edit.replace(end.node, taken(edit, end, *mine, border))
    edit.replace(node, m.source)


def shifted_input(edit: Editor, found: Projection, shift: Value) -> None:
    """The projection gives what it gave when its input was larger by `shift`, a number per channel."""
    end = End(replace(found, node=edit.current(found.node)), 1)
    edit.replace(end.node, taken(edit, end, None, shift))


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


def _repeated(edit: Editor, factor: Factor | None, end: End) -> Factor | None:
    """Each channel's number as often as flattening repeats it."""
    if not isinstance(factor, Value) or factor.ndim == 0 or end.repeats == 1:
        return factor
    channels = factor.shape[0]
    tall = edit.call(aten.expand.default, factor.reshape(channels, 1), [channels, end.repeats])
    return tall.reshape(channels * end.repeats)


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
