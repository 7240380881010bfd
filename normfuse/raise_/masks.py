"""What is added to the scores, as the mask of an attention: causal, boolean, or additive.

A boolean mask gives a row that sees nothing no weight at all, a written-out softmax shares the weight of such a row out
evenly (if masked scores are finite). Only where no row can be empty may the one stand for the other; else the mask is
additive and so large that the scores below it drown, which shares the weight out evenly too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.node import aten, shape, value
from normfuse.raise_.arrange import arranged
from normfuse.raise_.experiment import Concrete
from normfuse.raise_.labels import Atoms, Labels
from normfuse.raise_.roles import Role, Roles
from normfuse.raise_.scores import DROWNING, Bias, is_causal, some_row_is_empty, values_of
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
    if all(b.fill is not None and (b.fill == -math.inf or never_empty) for b in biases):
        return _boolean(biases, groups, atoms, q, k, edit), False
    return _additive(biases, groups, atoms, q, k, never_empty, edit), False


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


def _additive(
    biases: Sequence[Bias],
    groups: Sequence[tuple[int, ...]],
    atoms: Atoms,
    q: Value,
    k: Value,
    never_empty: bool,
    edit: Editor,
) -> Value | str:
    """The first of the biases was added last."""
    dtype = value(q.node).dtype
    drowned = any(b.floor > -math.inf or (b.fill is not None and b.fill > -math.inf) for b in biases) and not never_empty
    if dtype == torch.float16 and drowned:
        return "float16 has no number large enough to mask with"
    total: Value | None = None
    for bias in reversed(biases):
        assert bias.node is not None
        if bias.fill is None:
            term = _in_place(bias.node, bias.labels, groups, atoms, q, k, edit)
            if term is None:
                return "the bias cannot be brought into place"
            term = term.to(dtype)
            term = term if bias.factor == 1.0 else term * bias.factor
        else:
            keep = _kept(bias, groups, atoms, q, k, edit)
            if keep is None:
                return "the mask cannot be brought into place"
            low = -math.inf if bias.fill == -math.inf or never_empty else DROWNING
            term = edit.call(aten.where.Scalar, keep, 0.0, low).to(dtype)
        total = term if total is None else total + term
        if bias.floor > -math.inf and not never_empty:
            total = edit.call(aten.clamp_min.default, total, max(bias.floor, torch.finfo(dtype).min))
    assert total is not None
    return total
