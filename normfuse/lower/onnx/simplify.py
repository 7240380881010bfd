"""Small rewrites towards operators that ONNX runtimes do well."""

from __future__ import annotations

from torch import fx

from normfuse.node import argument, aten, is_one, is_op, rank, shape
from normfuse.rewrite import Editor, Value


def gather(node: fx.Node, edit: Editor) -> Value | None:
    """gather along the only axis that is longer than 1 is a selection: the same index for every row."""
    if not is_op(node, aten.gather):
        return None
    x, axis, index = (argument(node, name) for name in ("self", "dim", "index"))
    if rank(x) == 0 or rank(x) != rank(index):
        return None
    axis %= rank(x)
    others = [size for source in (x, index) for place, size in enumerate(shape(source)) if place != axis]
    if not all(is_one(size) for size in others):
        return None
    flat = edit.call(aten.reshape.default, index, [-1])
    return edit.call(aten.index_select.default, x, axis, flat)
