"""Putting a scale and a shift of the channels of a tensor into the weights of those who read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from normfuse.analysis.affine import AffineMap
from normfuse.analysis.projections import Projection
from normfuse.analysis.reach import End, Reach
from normfuse.analysis.signs import always_positive, positive_here
from normfuse.node import argument, aten, rank, shape, site, value
from normfuse.rewrite.editor import Editor, Value
from normfuse.rewrite.kernels import Factor, as_vector, build, scale_inputs, through

Factors = tuple[Factor, Factor | None]


def factors(edit: Editor, m: AffineMap, found: Reach) -> Factors | str:
    """Scale and shift of a diagonal map for its readers; or why not, if that depends on values and they say no."""
    with edit.at(found.ends[0].node):
        scale, shift = build(edit, m)
        checked = scale if found.positive_for is None else _positive(edit, scale, found.positive_for)
        return checked if isinstance(checked, str) else (checked, shift)


def fold_forward(edit: Editor, node: fx.Node, m: AffineMap, found: Reach, both: Factors) -> None:
    """Let every reader of `node` read what `m`, a diagonal map, reads, and do itself what `m` does."""
    scale, shift = both
    for end in found.ends:
        with edit.at(end.node):
            edit.replace(end.node, _taken(edit, end, _repeated(edit, scale, end), _repeated(edit, shift, end)))
    edit.replace(node, m.source)


def shifted_input(edit: Editor, found: Projection, shift: Value) -> None:
    """The projection gives what it gave when its input was larger by `shift`, a number per channel."""
    end = End(replace(found, node=edit.current(found.node)), 1)
    edit.replace(end.node, _taken(edit, end, None, shift))


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


def _taken(edit: Editor, end: End, scale: Factor | None, shift: Factor | None) -> Value:
    """W (s * x + c) + b = (W diag(s)) x + (b + W c); behind zeros, W c is another number at the border."""
    found = end.projection
    weight = edit.value(found.weight)
    scaled = weight if scale is None else _scaled(found, weight, scale).to(value(found.weight).dtype)
    if shift is None:
        return edit.rebuild(end.node, **{found.weight_name: scaled})
    if end.bordered:
        return edit.rebuild(end.node, **{found.weight_name: scaled}) + _bias_map(edit, end, shift)
    moved = _moved(edit, found, weight, shift).to(value(found.weight).dtype)
    if found.bias_name is None:
        return edit.rebuild(end.node, **{found.weight_name: scaled}) + moved
    bias = moved if found.bias is None else edit.value(found.bias) + moved
    return edit.rebuild(end.node, **{found.weight_name: scaled, found.bias_name: bias})


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


def _sizes(edit: Editor, source: fx.Node) -> Sequence[int]:
    """Channels and sizes of an image; a free size is asked for at run time."""
    wanted = range(1, rank(source))
    known = shape(source)
    return [s if isinstance(s := known[axis], int) else edit.call(aten.sym_size.int, source, axis) for axis in wanted]  # type: ignore[misc]
