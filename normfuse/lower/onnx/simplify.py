"""Small rewrites towards operators that ONNX runtimes do well."""

from __future__ import annotations

from torch import fx

from normfuse.lower.onnx import operators
from normfuse.node import argument, aten, is_one, is_op, rank, same_size, shape
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


def reshape(node: fx.Node, edit: Editor) -> Value | None:
    """A view whose sizes are the input's own, numbers, and one that is left needs no arithmetic on sizes."""
    if not is_op(node, aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten):
        return None
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    sizes: list[int] = []
    for place, size in enumerate(shape(node)):
        if place < rank(x) and same_size(size, shape(x)[place]) and not isinstance(size, int):
            sizes.append(0)
        else:
            sizes.append(size if isinstance(size, int) else -1)
    if sizes.count(-1) > 1 or any(s == 0 for s in (*shape(node), *shape(x)) if isinstance(s, int)):
        return None
    return edit.call(operators.RESHAPE.default, x, sizes)
