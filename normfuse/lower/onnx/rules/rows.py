"""Moving whole rows of channels (window partitions, cyclic shifts, patch merging) as one Gather with a fixed index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.analysis import Facts
from normfuse.analysis.layout import concrete, is_layout
from normfuse.graph.node import argument, aten, expression, is_op, rank, shape, value
from normfuse.graph.program import Program
from normfuse.lower.onnx import operators
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite import Editor, Exactness, Transform, computed
from normfuse.rewrite.editor import constant

_MOVES = Trait.JOIN | Trait.PERMUTE | Trait.SLICE
_LEAST_MOVES = 3
"""Passes over memory that a Gather must save to be worth its place: a lone Transpose is as fast."""


def gather_rows(program: Program, facts: Facts, edit: Editor) -> None:
    """roll, slice, cat, view and permute of one tensor (batch, ..., channels) -> reshape, Gather, reshape."""
    for node in reversed(computed(program)):
        if node._erased or not _is_move(node) or all(_is_move(user) for user in node.users):
            continue
        found = _region(node)
        if found is None:
            continue
        root, region = found
        if sum(_moves(n) for n in region) < _LEAST_MOVES or not _is_rows(root):
            continue
        index = _index(root, region, node)
        sizes = None if index is None else _sizes(node)
        if index is None or sizes is None or not edit.fire(node):
            continue
        with edit.at(node):
            length = _rows_per_sample(root)
            flat = (
                edit.value(root)
                if rank(root) == 3 and shape(root)[1] == length
                else edit.call(operators.RESHAPE.default, root, [-1, length, shape(root)[-1]])
            )
            table = constant(program, f"normfuse_rows_{node.name}", index)
            moved = edit.call(aten.index_select.default, flat, 1, table)
            edit.replace(node, edit.call(operators.RESHAPE.default, moved, sizes))


RULE = Transform("gather_rows", gather_rows, exactness=Exactness.BITWISE)


def _moves(node: fx.Node) -> int:
    """How often the node's elements pass through memory: a roll is done axis by axis."""
    if is_op(node, aten.roll):
        return max(1, len(argument(node, "dims")))
    return int(is_a(node, _MOVES))


def _is_move(node: Any) -> bool:
    return is_layout(node) or is_op(node, aten.roll, aten.cat, operators.RESHAPE)


def _region(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The one tensor that everything comes from, and the operators between; none of them read by others."""
    region: set[fx.Node] = set()
    roots: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in region:
            continue
        region.add(current)
        sources = current.args[0] if is_op(current, aten.cat) else [current.args[0]]
        for source in sources:  # type: ignore[union-attr]
            if _is_move(source):
                pending.append(source)  # type: ignore[arg-type]
            elif isinstance(source, fx.Node):
                roots.add(source)
    inner = region - {node}
    if len(roots) != 1 or any(user not in region for n in inner for user in n.users):
        return None
    return roots.pop(), sorted(region)


def _is_rows(root: fx.Node) -> bool:
    """(batch or windows * batch, sizes..., channels), all but the batch known."""
    sizes = shape(root)
    return len(sizes) >= 3 and all(isinstance(s, int) for s in sizes[1:]) and _windows(root) > 0


def _windows(root: fx.Node) -> int:
    """How many entries of the first axis belong to one sample; 0 if that cannot be said. What is fixed is one sample."""
    first = expression(shape(root)[0])
    if isinstance(first, int):
        return first
    symbols = list(first.free_symbols)
    per_sample = first / symbols[0] if len(symbols) == 1 else None
    return int(per_sample) if per_sample is not None and per_sample.is_Integer else 0


def _rows_per_sample(root: fx.Node) -> int:
    return _windows(root) * math.prod(int(s) for s in shape(root)[1:-1])


def _index(root: fx.Node, region: Sequence[fx.Node], node: fx.Node) -> Tensor | None:
    """For each row of the result the row of the root that it is, the same for every sample; None if rows are torn."""
    first = expression(shape(root)[0])
    if isinstance(first, int):
        return _rows(root, region, node, {}, 1)
    (symbol,) = first.free_symbols
    two, three = (_rows(root, region, node, {symbol: count}, count) for count in (2, 3))
    return two if two is not None and three is not None and torch.equal(two, three) else None


def _rows(root: fx.Node, region: Sequence[fx.Node], node: fx.Node, numbers: dict[Any, int], samples: int) -> Tensor | None:
    channels, length = int(shape(root)[-1]), _rows_per_sample(root)
    numbered = torch.arange(samples * length * channels)
    env: dict[fx.Node, Any] = {root: numbered.reshape([concrete(s, numbers) for s in shape(root)])}
    try:
        for current in region:
            args, kwargs = fx.map_arg(
                (current.args, dict(current.kwargs)), lambda n: env[n] if n in env else concrete(value(n), numbers)
            )
            env[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    moved = env[node]
    if moved.numel() % (samples * channels) or moved.shape[-1] % channels:
        return None
    rows = moved.reshape(samples, -1, channels)
    index = rows[..., 0] // channels
    whole = index[..., None] * channels + torch.arange(channels)
    shifted = index[0] + length * torch.arange(samples)[:, None]
    if not torch.equal(rows, whole) or not torch.equal(index, shifted) or int(index[0].max()) >= length:
        return None
    return index[0].contiguous()


def _sizes(node: fx.Node) -> list[int] | None:
    """The result's sizes with at most one free, for Reshape."""
    sizes = [s if isinstance(s, int) else -1 for s in shape(node)]
    return sizes if sizes.count(-1) <= 1 and 0 not in sizes and rank(node) >= 2 else None
