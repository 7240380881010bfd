"""Positive factors per channel between a writer and its readers: how large they should be, and putting them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.algebra.calibration import observe
from normfuse.algebra.push import into_reader
from normfuse.analysis.projections import Projection
from normfuse.analysis.routes import End
from normfuse.analysis.scaling import Pair
from normfuse.evaluate.rows import Weights
from normfuse.graph.node import argument, aten, value
from normfuse.graph.program import Program
from normfuse.rewrite.editor import Editor, Value

TINY = 1e-5
"""Floor of a magnitude that is divided by, as SmoothQuant has it: a channel that is silent on the calibration inputs may
not be on others."""

GRID = 20


@dataclass
class Seen:
    """What calibration saw of the input of a projection: largest and mean magnitude per channel, and some rows."""

    largest: Tensor
    total: Tensor
    count: int
    rows: list[Tensor]


def look(program: Program, pairs: Sequence[Pair], examples: Sequence[Any], what: str) -> dict[fx.Node, Seen]:
    """Run the examples and keep statistics of every input that a pair's readers read."""
    seen: dict[fx.Node, Seen] = {}
    axes = {argument(e.reader.node, e.reader.input_name): e.reader.channel_axis for p in pairs for e in p.ends}

    def see(node: fx.Node, got: Tensor) -> None:
        rows = got.movedim(axes[node], -1).flatten(0, -2).cpu()
        old = seen.get(node)
        largest, total = rows.abs().amax(0), rows.abs().sum(0)
        if old is None:
            seen[node] = Seen(largest, total, len(rows), [rows[:64]])
        else:
            kept = [*old.rows, rows[:64]] if len(old.rows) < 8 else old.rows
            seen[node] = Seen(old.largest.maximum(largest), old.total + total, old.count + len(rows), kept)

    if axes:
        observe(program, list(axes), examples, see, what)
    return seen


def smooth(edit: Editor, pair: Pair, alpha: float, seen: dict[fx.Node, Seen]) -> Value:
    """max|X|**alpha / max|W|**(1 - alpha); without calibration the writer's own weights stand for X."""
    weights = _largest_read(edit, pair)
    inputs = edit.constant(_of_writer(pair, seen, "largest"), "magnitude") if seen else _largest_written(edit, pair)
    dtype = weights.node.meta["val"].dtype
    top, bottom = (_clamped(edit, v.to(dtype)) for v in (inputs, weights))
    return _clamped(edit, _power(edit, top, alpha) / _power(edit, bottom, 1 - alpha))


def activation_aware(program: Program, pair: Pair, bits: int, seen: dict[fx.Node, Seen]) -> Tensor:
    """mean|X|**rho with the rho of a grid that loses least of the readers' outputs to rounding their weights."""
    mean = _of_writer(pair, seen, "mean").clamp(min=1e-4)
    weights = Weights(program)
    best, least = torch.ones_like(mean), float("inf")
    for step in range(GRID):
        scale = mean ** (step / GRID)
        scale = scale / (scale[pair.free].max() * scale[pair.free].min()).sqrt()
        loss = sum(_loss(weights, pair, end, scale, bits, seen) for end in pair.ends)
        if loss < least:
            best, least = scale, loss
    return best


def _loss(weights: Weights, pair: Pair, end: End, scale: Tensor, bits: int, seen: dict[fx.Node, Seen]) -> float:
    rows = torch.cat(seen[argument(end.reader.node, end.reader.input_name)].rows)
    weight, factor = weights.whole(end.reader.weight).cpu(), _per_input(scale, end)
    if end.reader.groups > 1 and end.reader.in_axis == 1:
        return _loss_by_group(weight, factor, end.reader.groups, bits, rows)
    weight = weight.movedim(end.reader.in_axis, -1).flatten(0, -2)
    rounded = fake_quantized(weight * factor, bits) / factor
    return float(((rounded - weight) @ rows.T).square().sum())


def _loss_by_group(weight: Tensor, factor: Tensor, groups: int, bits: int, rows: Tensor) -> float:
    """The same where an output sees only the inputs of its group: what each input loses, times how large it is."""
    scaled = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()) * factor.reshape(groups, 1, -1, 1)
    rounded = fake_quantized(scaled.reshape(len(weight), -1), bits).reshape(scaled.shape)
    lost = ((rounded - scaled) / factor.reshape(groups, 1, -1, 1)).square().sum([1, 3]).flatten()
    return float((lost * rows.square().sum(0)).sum())


def fake_quantized(x: Tensor, bits: int) -> Tensor:
    """Rounded to `bits` bits, symmetric, one step per row."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def _of_writer(pair: Pair, seen: dict[fx.Node, Seen], what: str) -> Tensor:
    """A statistic of the readers' inputs by the writer's channels."""
    found = torch.zeros(len(pair.free), dtype=torch.float64)
    for end, node in zip(pair.ends, pair.inputs, strict=True):
        got = seen[node].largest if what == "largest" else seen[node].total / seen[node].count
        by_channel = got[pair.copies(end)].amax(0)
        found = found.maximum(torch.where(pair.reads(end), by_channel, 0.0))
    return found


def _largest_read(edit: Editor, pair: Pair) -> Value:
    """max|W| over all readers, by the writer's channels."""
    found: list[Value] = []
    for end in pair.ends:
        weight = edit.value(argument(edit.current(end.reader.node), end.reader.weight_name))
        by_input = _amax_by_input(edit, weight, end.reader)
        copies = pair.copies(end)
        picked = edit.call(aten.index_select.default, by_input, 0, edit.constant(copies.flatten(), "index"))
        by_channel = edit.call(aten.amax.default, picked.reshape(*copies.shape), [0])
        found.append(by_channel)
    stacked = edit.call(aten.stack.default, found)
    return edit.call(aten.amax.default, stacked, [0])


def _largest_written(edit: Editor, pair: Pair) -> Value:
    node = edit.current(pair.writer)
    if pair.projection is not None:
        return _amax(edit, edit.value(argument(node, pair.projection.weight_name)), pair.projection.out_axis)
    gain = argument(node, "weight")
    if gain is None:
        return edit.constant(torch.ones(len(pair.free), dtype=torch.float64), "ones")
    return edit.call(aten.abs.default, gain)


def _amax(edit: Editor, weight: Value, kept: int) -> Value:
    others = [axis for axis in range(weight.ndim) if axis != kept % weight.ndim]
    return edit.call(aten.amax.default, edit.call(aten.abs.default, weight), others)


def _amax_by_input(edit: Editor, weight: Value, reader: Projection) -> Value:
    if reader.groups == 1 or reader.in_axis == 0:
        return _amax(edit, weight, reader.in_axis)
    outputs, inputs, *_ = (int(s) for s in weight.shape)
    apart = weight.reshape(reader.groups, outputs // reader.groups, inputs, -1)
    largest = edit.call(aten.amax.default, edit.call(aten.abs.default, apart), [1, 3])
    return largest.reshape(reader.groups * inputs)


def _power(edit: Editor, x: Value, exponent: float) -> Value:
    return edit.call(aten.pow.Tensor_Scalar, x, exponent)


def _clamped(edit: Editor, x: Value) -> Value:
    return edit.call(aten.clamp_min.default, x, TINY)


def _per_input(scale: Tensor, end: End) -> Tensor:
    return torch.cat([scale, scale.new_ones(1)])[end.labels]  # label -1: the one behind the last


def migrate(edit: Editor, pair: Pair, scale: Value) -> None:
    """The writer's channels become 1 / scale as large, and the weights that read them scale times as large."""
    node = edit.current(pair.writer)
    dtype = value(pair.ends[0].reader.weight if pair.ends else pair.writer).dtype
    if not bool(pair.free.all()):
        free = edit.constant(pair.free.double(), "free").to(dtype)
        scale = scale.to(dtype) * free + (-free + 1.0)
    scale = scale.to(dtype)
    with edit.at(node):
        edit.replace(node, edit.rebuild(node, **_divided(edit, pair, node, scale)))
    for end in pair.ends:
        into_reader(edit, end.reader, _picked(edit, scale, end.labels), None)
    for node, labels in pair.smoothed:
        _smooth_silu(edit, edit.current(node), labels, scale)


def score_scale(own: Tensor, other: Tensor, scale: Tensor) -> Tensor | str:
    """What the other side of the scores is divided by, if this side is divided by `scale`; both by their classes."""
    if len(scale) != len(own):
        return f"it writes {len(own)} channels, and {len(scale)} scales were given"
    by_class = torch.ones(len(own) + len(other), dtype=scale.dtype)
    by_class[own[own >= 0]] = scale[own >= 0]
    if not torch.equal(by_class[own[own >= 0]], scale[own >= 0]):
        return "channels that RoPE turns together, or that meet the same key, have different scales"
    return torch.where(other >= 0, 1 / by_class[other.clamp(min=0)], 1.0)


def _picked(edit: Editor, scale: Value, labels: Tensor) -> Value:
    """The scales of these channels; 1 where there is none (label -1)."""
    padded = edit.call(aten.constant_pad_nd.default, scale, [0, 1], 1.0)
    places = torch.where(labels < 0, int(scale.shape[0]), labels)
    return edit.call(aten.index_select.default, padded, 0, edit.constant(places, "index"))


def _smooth_silu(edit: Editor, node: fx.Node, labels: Tensor, scale: Value) -> None:
    """z sigmoid(z) = s z' sigmoid(s z') for z = s z': the s behind goes on, the one inside stays (MambaQuant's S-SiLU)."""
    for axis in range(labels.dim()):
        first = labels.narrow(axis, 0, 1)
        labels = first if bool((labels == first).all()) else labels
    z = edit.value(argument(node, "self"))
    with edit.at(node):
        inside = _picked(edit, scale, labels.flatten()).reshape(*labels.shape)
        edit.replace(node, z * edit.call(aten.sigmoid.default, z * inside))


def _divided(edit: Editor, pair: Pair, node: fx.Node, scale: Value) -> dict[str, Value]:
    found = pair.projection
    weight_name, bias_name = ("weight", "bias") if found is None else (found.weight_name, found.bias_name)
    weight, bias = argument(node, weight_name), argument(node, bias_name) if bias_name else None
    axis = -1 if found is None else found.out_axis
    changed: dict[str, Value] = {}
    if weight is None:
        changed[weight_name] = edit.call(aten.reciprocal.default, scale)
    else:
        whole = edit.value(weight)
        changed[weight_name] = whole / scale.along(axis, whole.ndim)
    if bias_name is not None and bias is not None:
        changed[bias_name] = edit.value(bias) / scale
    return changed
