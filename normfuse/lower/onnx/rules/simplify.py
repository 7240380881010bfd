"""Small rewrites towards operators that ONNX runtimes do well."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from normfuse.analysis.layout import is_layout
from normfuse.graph.node import Dim, argument, aten, dtype, is_getitem, is_one, is_op, is_weight, rank, same_size, shape
from normfuse.lower.decisions import Choice, nominal
from normfuse.lower.onnx import operators
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite import Editor, Exactness, Value, each


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
    if not is_op(node, aten.reshape):
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


def turned_back(node: fx.Node, edit: Editor) -> Value | None:
    """Axes that are moved twice are moved once, or not at all."""
    source = node.args[0] if node.args else None
    first, second = _order(source), _order(node)
    if first is None or second is None:
        return None
    assert isinstance(source, fx.Node)
    both = [first[axis] for axis in second]
    root = source.args[0]
    assert isinstance(root, fx.Node)
    return edit.value(root) if both == sorted(both) else edit.call(aten.permute.default, root, both)


def _order(node: object) -> list[int] | None:
    """For each axis of a permute the axis of its input."""
    if not isinstance(node, fx.Node) or not is_op(node, aten.permute):
        return None
    return [axis % rank(node) for axis in argument(node, "dims")]


def zero_pad(node: fx.Node, edit: Editor) -> Value | None:
    """A padding by nothing is a copy."""
    if not is_op(node, aten.pad, aten.constant_pad_nd) or any(argument(node, "pad")):
        return None
    return edit.value(argument(node, "self"))


def pad_before_pool(node: fx.Node, edit: Editor) -> Value | None:
    """A padding by 0 that a max pool reads names its axes: onnxruntime takes others for the pool's own, which is by -inf."""
    if not is_op(node, aten.pad, aten.constant_pad_nd) or not any(is_a(user, Trait.MAX_POOL) for user in node.users):
        return None
    pads, number = argument(node, "pad"), argument(node, "value") or 0.0
    constant = is_op(node, aten.constant_pad_nd) or argument(node, "mode") == "constant"
    if not constant or number != 0 or not all(isinstance(size, int) for size in pads):
        return None
    with edit.at(node):
        return edit.call(operators.PAD.default, argument(node, "self"), list(pads))



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
    choice: Choice = edit.choice
    if choice.decide(edit, "sum before a norm", "Sum", "Add", size=_rows_and_channels(node)) == "Add":
        return None
    with edit.at(node):
        return edit.call(operators.SUM.default, x, y)


def _rows_and_channels(node: fx.Node) -> tuple[int, int]:
    *rows, channels = nominal(shape(node))
    return max(1, math.prod(rows)), channels


def bias_gelu(node: fx.Node, edit: Editor) -> Value | None:
    """gelu(x @ w + b) with the bias added by the GELU rather than by the product, where the measurements say so."""
    choice: Choice = edit.choice
    if choice.target != "onnxruntime" or not is_op(node, aten.gelu) or argument(node, "approximate") != "none":
        return None
    total = argument(node, "self")
    if dtype(node) != torch.float32 or not is_op(total, aten.add) or argument(total, "alpha") != 1 or len(total.users) != 1:
        return None
    product, bias = total.args[:2]
    if not is_op(product, aten.matmul) or not isinstance(bias, fx.Node) or not is_weight(bias) or rank(bias) != 1:
        return None
    assert isinstance(product, fx.Node)
    weight = product.args[1]
    if not isinstance(weight, fx.Node) or not is_weight(weight) or rank(weight) != 2:
        return None
    rows, hidden = _rows_and_channels(node)
    size = (rows, nominal(shape(weight))[0], hidden)
    if choice.decide(edit, "gelu after a bias", "Gelu", "BiasGelu", size=size) == "Gelu":
        return None
    with edit.at(node):
        return edit.call(operators.BIAS_GELU.default, product, bias)


_NORMS = (operators.LAYER_NORM, operators.RMS_NORM, operators.FUNCTION)


def gate_before_norm(node: fx.Node, edit: Editor) -> Value | None:
    """x * silu(g) and x * sigmoid(g) under a norm, by exp: runtimes' Sigmoid is good to 1e-7 of 1, but not of itself.

    A norm makes rows of small numbers large, and their errors with them.
    """
    if not is_op(node, aten.silu, aten.sigmoid) or dtype(node) not in (torch.float32, torch.float64):
        return None
    if not _is_normed(node):
        return None
    with edit.at(node):
        x = edit.value(argument(node, "self"))
        below = edit.call(aten.add.Tensor, edit.call(aten.exp.default, edit.call(aten.neg.default, x)), 1.0)
        return x / below if is_op(node, aten.silu) else edit.call(aten.reciprocal.default, below)


def _is_normed(node: fx.Node) -> bool:
    """Does a norm read the node, or a product with it, perhaps in another layout?"""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if is_op(user, *_NORMS, operators.INSTANCE_NORM):
                return True
            if user not in seen and (is_layout(user) or is_op(user, aten.mul, aten._to_copy, aten.to, operators.RESHAPE)):
                seen.add(user)
                pending.append(user)
    return False


def fourier(node: fx.Node, edit: Editor) -> Value | None:
    """The real or imaginary part of a Fourier transform, in float64: runtimes compute theirs less exactly than torch."""
    if not is_op(node, aten.real, aten.imag) or dtype(node) != torch.float32:
        return None
    transform = node.args[0]
    if not is_op(transform, aten.fft_fft, aten.fft_fft2, aten.fft_fftn):
        return None
    assert isinstance(transform, fx.Node)
    x, axes, length = (argument(transform, name) for name in ("self", "dim", "n" if is_op(transform, aten.fft_fft) else "s"))
    if length is not None or argument(transform, "norm") not in (None, "backward") or dtype(x) != torch.float32:
        return None
    axes = list(range(rank(x))) if axes is None else [axes] if isinstance(axes, int) else list(axes)
    with edit.at(node):
        return edit.call(operators.FOURIER.default, x, [a % rank(x) for a in axes], is_op(node, aten.imag))


def part(node: fx.Node, edit: Editor) -> Value | None:
    """One of the parts of a split into sizes that are not known is a slice: the exporter would make a sequence of all."""
    if not is_getitem(node) or not is_op(node.args[0], aten.split, aten.chunk):
        return None
    whole, place = node.args[0], node.args[1]
    assert isinstance(whole, fx.Node) and isinstance(place, int)
    x, axis, count = argument(whole, "self"), argument(whole, "dim"), whole.args[1]
    if place < 0 or isinstance(shape(node)[axis], int) or (is_op(whole, aten.split) and not isinstance(count, fx.Node)):
        return None
    with edit.at(node):
        size = edit.value(count) if isinstance(count, fx.Node) else _rounded_up(edit, x, axis, count)  # type: ignore[arg-type]
        first = edit.call(operator.mul, size, place)
        return edit.call(aten.slice.Tensor, x, axis, first, edit.call(operator.add, first, size))


def _rounded_up(edit: Editor, x: fx.Node, axis: int, count: int) -> Value:
    """The size of all chunks but the last."""
    more = edit.call(operator.add, edit.call(aten.sym_size.int, x, axis), count - 1)
    return edit.call(operator.floordiv, more, count)


EARLY = (*(each(f, Exactness.BITWISE) for f in (zero_pad, pad_before_pool, turned_back)), each(fourier), each(part))
"""What is done on the way in, before other lowerings look."""
VIEWS = (each(gather, Exactness.BITWISE), each(reshape, Exactness.BITWISE))
LATE = (each(residual), each(bias_gelu), each(gate_before_norm))
"""What looks at norms and products in the operators of ONNX."""
