"""Small rewrites towards operators that ONNX runtimes do well."""

from __future__ import annotations

from torch import fx

from normfuse.lower.onnx import operators
from normfuse.node import Dim, argument, aten, dtype, is_one, is_op, rank, same_size, shape
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
    sources: list[fx.Node] = [node.args[0]]  # type: ignore[list-item]
    while is_op(sources[-1], operators.RESHAPE):
        sources.append(sources[-1].args[0])  # type: ignore[arg-type]
    for x in reversed(sources):
        sizes = _sizes(x, shape(node))
        if sizes is not None:
            return edit.call(operators.RESHAPE.default, x, sizes)
    return None


def _sizes(x: fx.Node, wanted: tuple[Dim, ...]) -> list[int] | None:
    """The wanted sizes as ONNX's Reshape takes them, or None if more than one of them would have to be worked out."""
    sizes: list[int] = []
    for place, size in enumerate(wanted):
        if place < rank(x) and same_size(size, shape(x)[place]) and not isinstance(size, int):
            sizes.append(0)
        else:
            sizes.append(size if isinstance(size, int) else -1)
    if sizes.count(-1) > 1 or any(s == 0 for s in (*wanted, *shape(x)) if isinstance(s, int)):
        return None
    return sizes


def zero_pad(node: fx.Node, edit: Editor) -> Value | None:
    """A padding by nothing is a copy."""
    if not is_op(node, aten.pad, aten.constant_pad_nd) or any(argument(node, "pad")):
        return None
    return edit.value(argument(node, "self"))


def residual(node: fx.Node, edit: Editor) -> Value | None:
    """A sum that norms alone read is a Sum: of Add and LayerNormalization onnxruntime makes an operator six times slower."""
    if not is_op(node, aten.add) or argument(node, "alpha") != 1 or not node.users:
        return None
    x, y = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or rank(x) != rank(y) or dtype(x) != dtype(y):
        return None
    same = all(same_size(a, b) for a, b in zip(shape(x), shape(y), strict=True))
    if not same or not all(is_op(user, operators.LAYER_NORM, operators.RMS_NORM) for user in node.users):
        return None
    with edit.at(node):
        return edit.call(operators.SUM.default, x, y)
