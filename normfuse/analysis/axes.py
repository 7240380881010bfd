"""Where a channel axis comes from: the one table of operators that carry an axis through unchanged.

An operator *carries* an axis if it acts alike on every channel and mixes none of them: out[..., c] is a linear function,
without a constant term, of the same channel c of its carried operands. So it commutes with every linear map of the
channels (centring, rotation) and with a common scale. Residual adds, token mixing, reshapes that leave the axis whole,
pooling over tokens and evaluation-time dropout are of this kind; a bias, a gain and a nonlinearity are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from normfuse.graph.node import (
    arguments,
    aten,
    is_getitem,
    is_one,
    operand,
    positive_axis,
    product,
    rank,
    same_size,
    shape,
    value,
)
from normfuse.ops.traits import Trait, is_a, traits_of

Carried = list[tuple[fx.Node, int]]


def carried_operands(node: fx.Node, axis: int) -> Carried | None:
    """Operands (with their axis) whose channels the operator carries to `axis` of its result; None if it is no carrier."""
    if node.op != "call_function":
        return None
    if is_getitem(node):
        # A piece of a split along this very axis is cut out of it, not carried.
        source = operand(node)
        return None if carried_operands(source, axis) is None else [(source, axis)]
    rule = _rule_of(node)
    if rule is None or rank_of(node) == 0:
        return None
    return rule(node, axis, arguments(node))


def carried_to(reader: fx.Node, operand: fx.Node, axis: int) -> int | None:
    """The axis of `reader`'s result that carries `axis` of `operand`, or None."""
    for candidate in range(rank_of(reader)):
        if (operand, axis) in (carried_operands(reader, candidate) or []):
            return candidate
    return None


def rank_of(node: fx.Node) -> int:
    """Dimensions of a tensor, or of the first tensor of a tuple."""
    v = value(node)
    while isinstance(v, tuple | list) and v:
        v = v[0]
    return v.dim() if isinstance(v, Tensor) else 0


def _operand_axis(node: fx.Node, operand: Any, axis: int) -> int | None:
    """The operand's own index of an axis of the (broadcast) result, if it has that axis in full."""
    if not isinstance(operand, fx.Node) or not isinstance(value(operand), Tensor):
        return None
    own = axis - (rank(node) - rank(operand))
    if own < 0 or not same_size(shape(operand)[own], shape(node)[axis]):
        return None
    return own


def _constant_along(node: fx.Node, operand: Any, axis: int) -> bool:
    """Is a factor the same for every channel: a number, or a tensor of size 1 there?"""
    if not isinstance(operand, fx.Node) or not isinstance(value(operand), Tensor):
        return True
    own = axis - (rank(node) - rank(operand))
    return own < 0 or (is_one(shape(operand)[own]) and not is_one(shape(node)[axis]))


def _sum(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    own = [(operand, _operand_axis(node, operand, axis)) for operand in (a["self"], a["other"])]
    return None if any(ax is None for _, ax in own) else own  # type: ignore[return-value]


def _product(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    for x, factor in ((a["self"], a["other"]), (a["other"], a["self"])):
        own = _operand_axis(node, x, axis)
        if own is not None and _constant_along(node, factor, axis):
            return [(x, own)]
    return None


def _quotient(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    own = _operand_axis(node, a["self"], axis)
    whole = own is not None and _constant_along(node, a["other"], axis) and a.get("rounding_mode") is None
    return [(a["self"], own)] if whole else None  # type: ignore[list-item]


def _first(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    return [(next(iter(a.values())), axis)]


def _dropout(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    return [(a["input"], axis)] if a["train"] is False else None


def _cast(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    floating = value(node).is_floating_point() and value(a["self"]).is_floating_point()
    return [(a["self"], axis)] if floating else None


def _view(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    source: fx.Node = a["self"] if "self" in a else a["input"]
    found = _same_place(shape(source), shape(node), axis)
    return None if found is None else [(source, found)]


def _same_place(before: tuple[Any, ...], after: tuple[Any, ...], axis: int) -> int | None:
    """The axis of `before` that a reshape to `after` keeps whole as `axis`: same size, same stride."""
    want = product(after[axis + 1 :])
    for candidate in range(len(before)):
        same = same_size(before[candidate], after[axis]) and not is_one(after[axis])
        if same and same_size(product(before[candidate + 1 :]), want):
            return candidate
    return None


def _expand(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    own = _operand_axis(node, a["self"], axis)
    return None if own is None else [(a["self"], own)]


def _permute(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    return [(a["self"], positive_axis(a["dims"][axis], rank(node)))]


def _unsqueeze(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    new = positive_axis(a["dim"], rank(node))
    return None if axis == new else [(a["self"], axis - (axis > new))]


def _concatenate(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    if positive_axis(a["dim"], rank(node)) == axis:
        return None
    return [(tensor, axis) for tensor in a["tensors"]]


def _stack(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    new = positive_axis(a["dim"], rank(node))
    return None if axis == new else [(tensor, axis - (axis > new)) for tensor in a["tensors"]]


def _along_other(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    """Operators that work along `dim` and keep the rank: slice, split, index_select, ..."""
    source: fx.Node = a["self"] if "self" in a else a["tensor"]
    return None if positive_axis(a["dim"], rank(source)) == axis else [(source, axis)]


def _select(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    gone = positive_axis(a["dim"], rank(a["self"]))
    return [(a["self"], axis + (axis >= gone))]


def _index(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    source, indices = a["self"], a["indices"]
    untouched = len(indices) < rank(source) and axis == rank(node) - 1
    return [(source, rank(source) - 1)] if untouched else None


def _many_axes(name: str) -> Callable[[fx.Node, int, dict[str, Any]], Carried | None]:
    def rule(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
        axes = [positive_axis(d, rank(a["self"])) for d in ([a[name]] if isinstance(a[name], int) else a[name])]
        return None if axis in axes or not axes else [(a["self"], axis)]

    return rule


def _reduce(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    """Sums and means over other axes."""
    dims = a.get("dim")
    if dims is None:
        return None
    source = a["self"]
    gone = sorted(positive_axis(d, rank(source)) for d in ([dims] if isinstance(dims, int) else dims))
    own = axis
    if not a.get("keepdim"):
        for removed in gone:
            own += own >= removed
    return None if not gone or own in gone else [(source, own)]


def _repeat(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    source, repeats = a["self"], a["repeats"]
    own = axis - (rank(node) - rank(source))
    return [(source, own)] if own >= 0 and is_one(repeats[axis]) and not is_one(shape(node)[axis]) else None


def _repeat_interleave(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    return None if a.get("dim") is None or "self" not in a else _along_other(node, axis, a)


def _pad(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    source, pads = a["self"], a["pad"]
    fill = a.get("value")
    constant = a.get("mode", "constant") == "constant"
    first = 2 * (rank(node) - 1 - axis)
    own = pads[first : first + 2] if first < len(pads) else [0, 0]
    harmless = not constant or fill in (None, 0, 0.0)
    return [(source, axis)] if harmless and all(type(p) is int and p == 0 for p in own) else None


def _masked_fill(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    zero = isinstance(a["value"], int | float) and a["value"] == 0
    own = _operand_axis(node, a["self"], axis)
    return [(a["self"], own)] if zero and own is not None and _constant_along(node, a["mask"], axis) else None


def _where(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    if not _constant_along(node, a["condition"], axis):
        return None
    return _sum(node, axis, a)


def _pool(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    """Average pooling and interpolation act on each channel alone; the channel axis stands before the spatial ones."""
    return [(next(iter(a.values())), axis)] if axis == rank(node) - traits_of(node).spatial - 1 else None


def _token_product(node: fx.Node, axis: int, a: dict[str, Any]) -> Carried | None:
    """P @ X mixes tokens: every channel, the last axis of X, alike."""
    right = a.get("other", a.get("mat2"))
    if not isinstance(right, fx.Node) or axis != rank(node) - 1 or rank(right) < 2 or rank(node) < 2:
        return None
    return [(right, rank(right) - 1)]


_Rule = Callable[[fx.Node, int, dict[str, Any]], Carried | None]
_RULES: dict[Any, _Rule] = {
    aten.add: _sum, aten.sub: _sum, aten.mul: _product, aten.div: _quotient, aten.neg: _first,
    aten.unsqueeze: _unsqueeze, aten.stack: _stack,
    aten.mean: _reduce, aten.sum: _reduce, aten.repeat: _repeat, aten.repeat_interleave: _repeat_interleave,
    aten.index: _index, aten.index_select: _along_other, aten.masked_fill: _masked_fill, aten.where: _where,
    aten.matmul: _token_product, aten.bmm: _token_product,
}  # fmt: skip
_BY_TRAIT: tuple[tuple[Trait, _Rule], ...] = (
    (Trait.RESHAPE, _view),
    (Trait.PERMUTE, _permute),
    (Trait.EXPAND, _expand),
    (Trait.SLICE | Trait.SPLIT, _along_other),
    (Trait.SELECT | Trait.UNBIND, _select),
    (Trait.COPY, _first),
    (Trait.CAST, _cast),
    (Trait.DROPOUT, _dropout),
    (Trait.JOIN, _concatenate),
    (Trait.ROLL, _many_axes("dims")),
    (Trait.PAD, _pad),
    (Trait.MEAN_POOL | Trait.AVERAGE, _pool),
)


def _rule_of(node: fx.Node) -> _Rule | None:
    own = _RULES.get(getattr(node.target, "overloadpacket", None))
    return own or next((rule for trait, rule in _BY_TRAIT if is_a(node, trait)), None)
