"""What is added to the scores, as the mask of an attention: causal, boolean, or additive.

The operator gives a row that sees nothing no weight at all. A written-out softmax shares the weight of such a row out
evenly where masked scores are finite, and makes it not a number where they are minus infinity. Only where no row can be
empty may the one stand for the other; else the mask is additive: so large that the scores below it drown, and not a number
where the original is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.sizes import Concrete
from normfuse.graph.node import aten, is_op, shape, value
from normfuse.graph.roles import Role, Roles
from normfuse.graph.walk import walk
from normfuse.recognise.attention.arrange import arranged
from normfuse.recognise.attention.labels import Atoms, Labels, is_look
from normfuse.recognise.attention.scores import DROWNING, Bias, is_causal, some_row_is_empty, values_of
from normfuse.rewrite import Editor, Value


def mask_of(
    biases: Sequence[Bias],
    groups: Sequence[tuple[int, ...]],
    atoms: Atoms,
    q: Value,
    k: Value,
    roles: Roles,
    concretes: Sequence[Concrete],
    edit: Editor,
) -> tuple[Value | str | None, bool]:
    """(the mask or None or why there is none, is it causal?)"""
    if not biases:
        return None, False
    fixed = all(b.node is not None and roles(b.node) is Role.FIXED for b in biases)
    tables = [_table(biases, groups, atoms, c) for c in concretes] if fixed else []
    known = [t for t in tables if t is not None]
    if fixed and known and all(is_causal(t) for t in known) and len(known) == len(tables):
        return None, True
    never_empty = fixed and bool(known) and not any(some_row_is_empty(t) for t in known)
    if never_empty and all(b.fill is not None for b in biases):
        return _boolean(biases, groups, atoms, q, k, edit), False
    reason = None if never_empty else _not_alike(biases, value(q.node).dtype)
    if reason is not None:
        return reason, False
    mask = _additive(biases, groups, atoms, q, k, never_empty, edit)
    if isinstance(mask, Value) and not never_empty and _may_be_infinite(biases, roles, concretes):
        empty = edit.call(aten.all.dim, edit.call(aten.eq.Scalar, mask, -math.inf), -1, True)
        mask = edit.call(aten.where.ScalarSelf, empty, math.nan, mask)
    return mask, False


def _in_place(
    node: fx.Node, labels: Labels, groups: Sequence[tuple[int, ...]], atoms: Atoms, q: Value, k: Value, edit: Editor
) -> Value | None:
    """The tensor along the axes of the scores; an axis of which it has a part (a window of an image) is spread out."""
    whole = arranged(node, labels, groups, atoms, edit)
    if whole is not None:
        return whole
    own = {a for axis in atoms.settled(labels) for a in axis}
    fine: list[tuple[int, ...]] = []
    merged: list[list[int]] = []
    for group in groups:
        parts = [(a,) for a in group] if set(group) & own and not set(group) <= own else [group]
        merged.append(list(range(len(fine), len(fine) + len(parts))))
        fine += parts
    x = arranged(node, labels, fine, atoms, edit)
    if x is None:
        return None
    sizes: list[Any] = [-1] * len(fine)
    final: list[Any] = []
    for axis, places in enumerate(merged):
        width = _size(q, axis, edit) if axis < len(groups) - 1 else _size(k, axis - 1, edit)
        known = 1
        for place in places if len(places) > 1 else []:
            size = atoms.sizes[fine[place][0]]
            if fine[place][0] in own:
                known = size if isinstance(size, int) else _size(x, place, edit)
        for place in places if len(places) > 1 else []:
            if fine[place][0] not in own:
                if len(places) > 2:
                    return None
                sizes[place] = edit.call(operator.floordiv, width, known) if not isinstance(width, int) else width // known
        final.append(width if len(places) > 1 else _size(x, places[0], edit))
    return edit.call(aten.expand.default, x, sizes).reshape(*final)


def _size(x: Value, axis: int, edit: Editor) -> Any:
    size = shape(x.node)[axis]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, x, axis)


def _table(biases: Sequence[Bias], groups: Sequence[tuple[int, ...]], atoms: Atoms, concrete: Concrete) -> Tensor | None:
    """The sum of fixed biases as a table of queries and keys, if it is one."""
    total: Tensor | None = None
    for bias in biases:
        values = values_of(bias, concrete)
        axes = atoms.settled(bias.labels)
        if values is None or len(axes) < 2 or tuple(axes[-2:]) not in {(groups[-2], groups[-1]), ((), groups[-1])}:
            return None
        total = values if total is None else total + values
    return total


def _boolean(
    biases: Sequence[Bias], groups: Sequence[tuple[int, ...]], atoms: Atoms, q: Value, k: Value, edit: Editor
) -> Value | str:
    total: Value | None = None
    for bias in biases:
        keep = _kept(bias, groups, atoms, q, k, edit)
        if keep is None:
            return "the mask cannot be brought into place"
        total = keep if total is None else edit.call(aten.logical_and.default, total, keep)
    assert total is not None
    return total


def _kept(
    bias: Bias, groups: Sequence[tuple[int, ...]], atoms: Atoms, q: Value, k: Value, edit: Editor
) -> Value | None:
    node = bias.node
    assert node is not None
    inverted = _inverted(node)
    keep = bias.keep
    if inverted is not None and not keep:
        node, keep = inverted, True
    mask = _in_place(node, bias.labels, groups, atoms, q, k, edit)
    if mask is None:
        return None
    if value(mask.node).dtype != torch.bool:
        mask = edit.call(aten.ne.Scalar, mask, 0)
    return mask if keep else edit.call(aten.logical_not.default, mask)


def _inverted(node: fx.Node) -> fx.Node | None:
    """~x"""
    spelt = node.op == "call_function" and node.target in (aten.logical_not.default, aten.bitwise_not.default)
    source = node.args[0] if spelt else None
    return source if isinstance(source, fx.Node) and value(source).dtype == torch.bool else None


def _not_alike(biases: Sequence[Bias], dtype: torch.dtype) -> str | None:
    """Why a row that sees nothing cannot be given the weights that it has in the original."""
    fills = [b.fill for b in biases if b.fill is not None and b.fill > -math.inf]
    if dtype == torch.float16 and (fills or any(b.floor > -math.inf for b in biases)):
        return "float16 has no number large enough to mask with"
    shallow = [i for i, b in enumerate(biases) if b.fill is not None and b.fill > DROWNING]
    if len({biases[i].fill for i in shallow}) > 1:
        return "scores are masked with several numbers, and a row may be masked in full"
    if shallow and any(b.fill is None for b in biases[: shallow[-1]]):
        return "a bias is added to masked scores, and a row may be masked in full"
    return None


def _additive(
    biases: Sequence[Bias],
    groups: Sequence[tuple[int, ...]],
    atoms: Atoms,
    q: Value,
    k: Value,
    never_empty: bool,
    edit: Editor,
) -> Value | str:
    """What was done to the scores, done to zeros, in the same order: the first of the biases was added last."""
    dtype = value(q.node).dtype
    lowest = torch.finfo(dtype).min
    total: Value | None = None
    for bias in reversed(biases):
        assert bias.node is not None
        if bias.fill is None:
            term = _in_place(bias.node, bias.labels, groups, atoms, q, k, edit)
            if term is None:
                return "the bias cannot be brought into place"
            term = term.to(dtype)
            term = term if bias.factor == 1.0 else term * bias.factor
            total = term if total is None else total + term
        else:
            keep = _kept(bias, groups, atoms, q, k, edit)
            if keep is None:
                return "the mask cannot be brought into place"
            infinite = bias.fill == -math.inf or never_empty
            low = -math.inf if infinite else max(min(bias.fill, DROWNING), lowest)
            if total is None:
                total = edit.call(aten.where.Scalar, keep, 0.0, low).to(dtype)
            else:
                total = edit.call(aten.where.ScalarOther, keep, total, low)
        if bias.floor > -math.inf and not never_empty:
            total = edit.call(aten.clamp_min.default, total, max(bias.floor, lowest))
    assert total is not None
    return total


_ARITHMETIC = (
    aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.where, aten.masked_fill, aten.cat, aten.stack, aten.slice,
    aten.select, aten.index, aten.gather, aten.minimum, aten.maximum, aten.clamp, aten.clamp_min, aten.index_select,
)  # fmt: skip
_LOGARITHMS = (aten.log, aten.log2, aten.log10, aten.log1p, aten.log_softmax, aten.log_sigmoid)


def _may_be_infinite(biases: Sequence[Bias], roles: Roles, concretes: Sequence[Concrete]) -> bool:
    infinite = False
    for bias in reversed(biases):
        assert bias.node is not None
        own = bias.fill == -math.inf if bias.fill is not None else _reaches_infinity(bias.node, roles, concretes)
        infinite = (infinite or own) and bias.floor == -math.inf
    return infinite


def _reaches_infinity(node: fx.Node, roles: Roles, concretes: Sequence[Concrete]) -> bool:
    """May entries be minus infinity by design: given so, filled so, or the logarithm of nothing?"""

    def step(current: fx.Node) -> list[fx.Node]:
        passes = roles(current) is Role.ACTIVATION and (is_look(current) or is_op(current, *_ARITHMETIC))
        return [n for n in current.all_input_nodes if isinstance(value(n), Tensor)] if passes else []

    def reaches(current: fx.Node) -> bool:
        if roles(current) is Role.FIXED and _is_infinite_table(current, concretes):
            return True
        if current.op == "placeholder":
            return bool(value(current).is_floating_point())
        return is_op(current, *_LOGARITHMS) or any(isinstance(a, float) and math.isinf(a) for a in current.args)

    return any(reaches(current) for current in walk([node], step))


def _is_infinite_table(node: fx.Node, concretes: Sequence[Concrete]) -> bool:
    try:
        known = concretes[-1].fixed(node)
    except Exception:
        return True
    return isinstance(known, Tensor) and known.is_floating_point() and bool(torch.isinf(known).any())
