"""Bringing a labelled tensor into the axes that an operator wants, with as few views as it takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from normfuse.graph.node import aten, is_op, same_size, shape
from normfuse.graph.spelling import size_of_inputs
from normfuse.recognise.attention.labels import Atoms, Labels, behind, is_look
from normfuse.rewrite import Editor, Value

_MAX_VIEWS = 8


class Unknown(Exception):
    """A size that nothing here can be asked for."""


def reachable(node: fx.Node, labels: Labels, atoms: Atoms) -> list[tuple[fx.Node, Labels]]:
    """The tensor and what it is a view of (casts are left), nearest first."""
    found = [(node, labels)]
    for _ in range(_MAX_VIEWS):
        node, labels = found[-1]
        if not is_look(node) or is_op(node, aten.to, aten._to_copy, aten.type_as):
            break
        step = behind(node, labels, atoms)
        if step is None:
            break
        found.append(step)
    return found


def arranged(
    node: fx.Node, labels: Labels, groups: Sequence[Sequence[int]], atoms: Atoms, edit: Editor
) -> Value | None:
    """The tensor with one axis for each group of atoms, of size one where it has none of them. None: it cannot be.

    Of the tensor and what it is a view of, whichever needs the least is taken.
    """
    wanted = [tuple(atoms.leaves(g)) for g in groups]
    plans = []
    for source, own in reachable(node, labels, atoms):
        plan = _plan(atoms.settled(own), wanted)
        if plan is not None:
            plans.append((_cost(plan), len(plans), source, plan))
    if not plans:
        return None
    _, _, source, plan = min(plans, key=lambda p: p[:2])
    try:
        return _apply(edit.value(source), plan, atoms, edit)
    except Unknown:
        return None


class _Plan:
    """Part the axes into `units`, permute them by `order`, join them into `joined` (lists of positions in the order)."""

    def __init__(self, axes: Labels, units: Labels, order: list[int], joined: list[list[int]]) -> None:
        self.axes, self.units, self.order, self.joined = axes, units, order, joined


def _plan(axes: Labels, wanted: list[tuple[int, ...]]) -> _Plan | None:
    if axes == wanted:
        return _Plan(axes, axes, [], [])
    for units in (list(axes), [(a,) for axis in axes for a in axis]):
        plan = _with_units(axes, units, wanted)
        if plan is not None:
            return plan
    return None


def _with_units(axes: Labels, units: Labels, wanted: list[tuple[int, ...]]) -> _Plan | None:
    order: list[int] = []
    joined: list[list[int]] = []
    for group in wanted:
        mine = [u for u, unit in enumerate(units) if unit and set(unit) & set(group)]
        mine.sort(key=lambda u: group.index(units[u][0]) if units[u][0] in group else -1)
        if mine and tuple(a for u in mine for a in units[u]) != group:
            return None
        joined.append(list(range(len(order), len(order) + len(mine))))
        order += mine
    missing = [u for u in range(len(units)) if u not in order]
    return None if any(units[u] for u in missing) else _Plan(axes, units, order, joined)


def _cost(plan: _Plan) -> int:
    if not plan.joined:
        return -1
    parted = plan.units != plan.axes
    moved = plan.order != sorted(plan.order)
    joined = any(len(j) != 1 for j in plan.joined) or len(plan.order) != len(plan.units)
    return 2 * (moved and any(len(j) > 1 for j in plan.joined)) + parted + moved + joined


def _apply(x: Value, plan: _Plan, atoms: Atoms, edit: Editor) -> Value:
    if not plan.joined:
        return x
    if plan.units != plan.axes:
        x = _reshape(x, [[atoms.sizes[a] for a in unit] for unit in plan.units], edit)
    else:
        for axis in reversed([u for u, unit in enumerate(plan.units) if not unit]):
            x = edit.call(aten.squeeze.dim, x, axis)
    kept = [u for u, unit in enumerate(plan.units) if unit]
    order = [kept.index(u) for u in plan.order]
    if order != sorted(order):
        x = edit.call(aten.permute.default, x, order)
    if any(len(j) > 1 for j in plan.joined):
        return _reshape(x, [[shape(x.node)[i] for i in group] for group in plan.joined], edit, joined=plan.joined)
    for axis, group in enumerate(plan.joined):
        if not group:
            x = edit.call(aten.unsqueeze.default, x, axis)
    return x


def _reshape(x: Value, sizes: list[list[Any]], edit: Editor, joined: list[list[int]] | None = None) -> Value:
    """At most one free size is left to torch, the others are asked of the tensor."""
    wanted: list[Any] = []
    for axis, factors in enumerate(sizes):
        if all(isinstance(s, int) for s in factors):
            total = 1
            for s in factors:
                total *= int(s)
            wanted.append(total)
        elif -1 not in wanted:
            wanted.append(-1)
        else:
            wanted.append(_asked(x, factors, joined[axis] if joined is not None else None, edit))
    return x.reshape(*wanted)


def _asked(x: Value, factors: list[Any], axes: list[int] | None, edit: Editor) -> Any:
    """A product of sizes: those of these axes of the tensor, or these, wherever they are known from."""
    given = factors if axes is None else [shape(x.node)[axis] for axis in axes]
    total: Any = None
    for factor in given:
        asked = _size(x, factor, edit)
        total = asked if total is None else edit.call(operator.mul, total, asked)
    return total


def _size(x: Value, size: Any, edit: Editor) -> Any:
    axis = next((i for i, s in enumerate(shape(x.node)) if same_size(s, size)), None)
    if axis is not None:
        known = shape(x.node)[axis]
        return known if isinstance(known, int) else edit.call(aten.sym_size.int, x, axis)
    found = size_of_inputs(x.node.graph, size, lambda target, *args: edit.call(target, *args).node)
    if found is None:
        raise Unknown(f"the size {size} is not that of an input")
    return found
