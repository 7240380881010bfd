"""Adaptive pools as slices and their means or maxima: torch's exporter has them for windows of one size that it knows."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from normfuse.graph.node import Dim, argument, aten, is_getitem, is_op, rank, same_size, shape
from normfuse.rewrite import Editor, Value, each

_MEANS = {aten.adaptive_avg_pool1d: 1, aten.adaptive_avg_pool2d: 2, aten.adaptive_avg_pool3d: 3}
_MAXIMA = {aten.adaptive_max_pool1d: 1, aten.adaptive_max_pool2d: 2, aten.adaptive_max_pool3d: 3}


def adaptive_pool(node: fx.Node, edit: Editor) -> Value | None:
    """Output i of n along an axis of size s is over [floor(i s / n), ceil((i + 1) s / n)), one axis after the other."""
    pool = node.args[0] if is_getitem(node) and node.args[1] == 0 else node
    spatial = next((axes for target, axes in (_MEANS | _MAXIMA).items() if is_op(pool, target)), 0)
    if not isinstance(pool, fx.Node) or not spatial or is_op(pool, *_MAXIMA) == (pool is node):
        return None
    x = argument(pool, "self")
    wanted = [shape(node)[axis] for axis in range(-spatial, 0)]
    sizes = [shape(x)[axis] for axis in range(-spatial, 0)]
    if all(_is_plain(size, count) for size, count in zip(sizes, wanted, strict=True)):
        return None
    reduce = aten.mean.dim if is_op(pool, *_MEANS) else aten.amax.default
    with edit.at(node):
        result = edit.value(x)
        for axis, size, count in zip(range(rank(x) - spatial, rank(x)), sizes, wanted, strict=True):
            if same_size(size, count):
                continue
            if not isinstance(count, int):
                return None
            parts = [edit.call(reduce, part, [axis], True) for part in _windows(edit, result, axis, size, count)]
            result = edit.call(aten.cat.default, parts, axis) if count > 1 else parts[0]
        return result


def _is_plain(size: Dim, count: Dim) -> bool:
    """Nothing to pool, everything in one window, or windows of one known size: the exporter's own."""
    if same_size(size, count) or not isinstance(count, int):
        return same_size(size, count)
    return count == 1 or (isinstance(size, int) and size % count == 0)


def _windows(edit: Editor, x: Value, axis: int, size: Dim, count: int) -> list[Value]:
    if count == 1:
        return [x]
    free = None if isinstance(size, int) else edit.call(aten.sym_size.int, x, axis)

    def bound(place: int, more: int) -> Any:
        """(place * size + more) // count"""
        if free is None:
            return (place * size + more) // count
        total = edit.call(operator.add, edit.call(operator.mul, free, place), more)
        return edit.call(operator.floordiv, total, count)

    return [
        edit.call(aten.slice.Tensor, x, axis, bound(place, 0), bound(place + 1, count - 1)) for place in range(count)
    ]


RULE = each(adaptive_pool)
