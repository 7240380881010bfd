"""Positive factors per channel between a writer and its readers: how large they should be, and putting them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.analysis.projections import Projection
from normfuse.analysis.routes import End
from normfuse.evaluate import Weights
from normfuse.node import argument, aten
from normfuse.program import Program
from normfuse.rewrite.calibration import observe
from normfuse.rewrite.editor import Editor, Value

TINY = 1e-5
GRID = 20


@dataclass(frozen=True)
class Pair:
    """`writer` (a norm or a projection) writes channels, of which those in `free` are read by `ends` alone."""

    writer: fx.Node
    projection: Projection | None
    free: Tensor
    ends: tuple[End, ...]

    @property
    def inputs(self) -> list[fx.Node]:
        return [argument(end.reader.node, end.reader.input_name) for end in self.ends]

    def copies(self, end: End) -> Tensor:
        """(copy, channel): the inputs at which the end reads each of the writer's channels; 0 where it does not."""
        places = [(end.labels == label).nonzero().flatten() for label in range(len(self.free))]
        most = max(len(found) for found in places)
        fill = [found if len(found) else torch.zeros(1, dtype=torch.long) for found in places]
        return torch.stack([found[torch.arange(most).clamp(max=len(found) - 1)] for found in fill], -1)

    def reads(self, end: End) -> Tensor:
        return torch.isin(torch.arange(len(self.free)), end.labels)


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
    weight = weights.whole(end.reader.weight).cpu().movedim(end.reader.in_axis, -1).flatten(0, -2)
    factor = _per_input(scale, end)
    rounded = fake_quantized(weight * factor, bits) / factor
    return float(((rounded - weight) @ rows.T).square().sum())


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
        by_input = _amax(edit, weight, end.reader.in_axis)
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


def _power(edit: Editor, x: Value, exponent: float) -> Value:
    return edit.call(aten.pow.Tensor_Scalar, x, exponent)


def _clamped(edit: Editor, x: Value) -> Value:
    return edit.call(aten.clamp_min.default, x, TINY)


def _per_input(scale: Tensor, end: End) -> Tensor:
    return torch.cat([scale, scale.new_ones(1)])[end.labels]  # label -1: the one behind the last


def migrate(edit: Editor, pair: Pair, scale: Value) -> None:
    """The writer's channels become 1 / scale as large, and the weights that read them scale times as large."""
    node = edit.current(pair.writer)
    dtype = edit.value(pair.ends[0].reader.weight).node.meta["val"].dtype if pair.ends else torch.float32
    if not bool(pair.free.all()):
        free = edit.constant(pair.free.double(), "free").to(dtype)
        scale = scale.to(dtype) * free + (-free + 1.0)
    scale = scale.to(dtype)
    with edit.at(node):
        edit.replace(node, edit.rebuild(node, **_divided(edit, pair, node, scale)))
    for end in pair.ends:
        reader = replace(end.reader, node=edit.current(end.reader.node))
        labels = torch.where(end.labels < 0, len(pair.free), end.labels)
        padded = edit.call(aten.constant_pad_nd.default, scale, [0, 1], 1.0)
        factor = edit.call(aten.index_select.default, padded, 0, edit.constant(labels, "index"))
        weight = edit.value(reader.weight)
        with edit.at(reader.node):
            scaled = weight * factor.along(reader.in_axis, weight.ndim)
            edit.replace(reader.node, edit.rebuild(reader.node, **{reader.weight_name: scaled}))


def _divided(edit: Editor, pair: Pair, node: fx.Node, scale: Value) -> dict[str, Value]:
    found = pair.projection
    weight_name, bias_name = ("weight", "bias") if found is None else (found.weight_name, found.bias_name)
    weight, bias = argument(node, weight_name), argument(node, bias_name) if bias_name else None
    axis = -1 if found is None else found.out_axis
    changed: dict[str, Value] = {}
    if weight is None:
        changed[weight_name] = edit.call(aten.reciprocal.default, scale)
    else:
        value = edit.value(weight)
        changed[weight_name] = value / scale.along(axis, value.ndim)
    if bias_name is not None and bias is not None:
        changed[bias_name] = edit.value(bias) / scale
    return changed
