"""One spelling of each thing: which operators canonical graphs do not hold, and what they hold instead.

    transpose t movedim moveaxis swapaxes swapdims mT mH numpy_T adjoint, einsum of one operand   permute
    view flatten unflatten squeeze ravel reshape_as view_as                                       reshape
    expand_as broadcast_to                                                                        expand
    concat concatenate                                                                            cat
    narrow from a known place on                                                                  slice

`squeeze` means one thing or another by the sizes that it meets, so it is spelt by the sizes that are left. `unsqueeze`
stays: it names no size, and is exact for all of them. Free sizes are asked for (`sym_size`, of an input if that has it) and
never left to a -1, which an empty batch would not determine.

Capture and the editor spell every call by this table, and `structure` rejects what is in it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import sympy
from torch import fx

from normfuse.graph.node import aten, bound_arguments, expression, is_one, positive_axis, rank, shape, value

Given = Mapping[str, Any]
Make = Callable[..., Any]
"""`make(target, *args)` gives the node of a further call, which stands before the one that is spelt."""
Call = tuple[Any, tuple[Any, ...]]


def _always(given: Given) -> bool:
    return True


@dataclass(frozen=True)
class Spelling:
    """How calls of one operator are spelt, `when` they are to be spelt otherwise."""

    spell: Callable[[Given, Make], Call]
    when: Callable[[Given], bool] = _always


def spelt(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], make: Make) -> tuple[Any, Any, Any]:
    """A call in the one spelling of what it computes: target, positional and named arguments."""
    entry = SPELLINGS.get(target)
    if entry is None:
        return target, args, kwargs
    given = bound_arguments(target, args, kwargs)
    return (*entry.spell(given, make), {}) if entry.when(given) else (target, args, kwargs)


def is_canonical(node: fx.Node) -> bool:
    """Is the call spelt as canonical graphs spell it?"""
    entry = SPELLINGS.get(node.target)
    return entry is None or not entry.when(bound_arguments(node.target, node.args, node.kwargs))


# -- permute ------------------------------------------------------------------------------------------------------------


def _permuted(order_of: Callable[[Given, int], list[int]]) -> Spelling:
    def spell(given: Given, make: Make) -> Call:
        x = given["self"]
        return aten.permute.default, (x, order_of(given, rank(x)))

    return Spelling(spell)


def _swapped(first: str, second: str) -> Callable[[Given, int], list[int]]:
    def order_of(given: Given, count: int) -> list[int]:
        return _exchanged(count, given[first], given[second]) if count else []

    return order_of


def _exchanged(count: int, a: int, b: int) -> list[int]:
    order = list(range(count))
    order[a], order[b] = order[b], order[a]
    return order


def _last_swapped(given: Given, count: int) -> list[int]:
    return _exchanged(count, -1, -2) if count > 1 else list(range(count))


def _reversed(given: Given, count: int) -> list[int]:
    return list(reversed(range(count)))


def _moved(given: Given, count: int) -> list[int]:
    sources, targets = (_axes(given[name], count) for name in ("source", "destination"))
    at = dict(zip(targets, sources, strict=True))
    rest = iter(axis for axis in range(count) if axis not in sources)
    return [at[place] if place in at else next(rest) for place in range(count)]


def _adjoint(given: Given, make: Make) -> Call:
    x = given["self"]
    turned = (x, _last_swapped(given, rank(x)))
    if not value(x).is_complex():
        return aten.permute.default, turned
    return aten.conj.default, (make(aten.permute.default, *turned),)


def _is_rearrangement(given: Given) -> bool:
    """`einsum("bchw->bhwc", x)`"""
    before, arrow, after = given["equation"].replace(" ", "").partition("->")
    distinct = len(set(before)) == len(before) and before.isalpha()
    return bool(arrow) and distinct and sorted(before) == sorted(after) and len(given["tensors"]) == 1


def _rearranged(given: Given, make: Make) -> Call:
    before, _, after = given["equation"].replace(" ", "").partition("->")
    return aten.permute.default, (given["tensors"][0], [before.index(letter) for letter in after])


def _axes(given: Any, count: int) -> list[int]:
    return [positive_axis(axis, count) for axis in ([given] if isinstance(given, int) else given)]


# -- reshape, expand ------------------------------------------------------------------------------------------------------


def _to_sizes(target: Any, sizes_of: Callable[[Given, Make], Sequence[Any]]) -> Spelling:
    return Spelling(lambda given, make: (target, (given["self"], list(sizes_of(given, make)))))


def _named(given: Given, make: Make) -> Sequence[Any]:
    return given["size"]  # type: ignore[no-any-return]


def _of_other(given: Given, make: Make) -> list[Any]:
    return sizes(given["other"], make)


def sizes(x: fx.Node, make: Make) -> list[Any]:
    """The sizes of a tensor: numbers, and nodes that ask for the free ones."""
    return [_size(x, axis, make) for axis in range(rank(x))]


def _size(x: fx.Node, axis: int, make: Make) -> Any:
    """Of an input if it is known from there: a tensor on the way has one reader less."""
    known = size_of_inputs(x.graph, shape(x)[axis], make)
    return make(aten.sym_size.int, x, axis) if known is None else known


def size_of_inputs(graph: fx.Graph, size: Any, make: Make) -> Any:
    """A size as a number, or worked out from those of the inputs; None where it does not follow from them by sums and
    products."""
    known = expression(size)
    if isinstance(known, int):
        return known
    places = {str(expression(s)): (n, i) for n in graph.find_nodes(op="placeholder") for i, s in enumerate(shape(n))}
    if not _is_arithmetic(known) or not all(str(symbol) in places for symbol in known.free_symbols):
        return None
    return _worked_out(known, places, make)


def _is_arithmetic(size: Any) -> bool:
    return all(part.is_Integer or part.is_Symbol or part.is_Add or part.is_Mul for part in sympy.preorder_traversal(size))


def _worked_out(size: Any, places: Mapping[str, tuple[fx.Node, int]], make: Make) -> Any:
    if size.is_Integer:
        return int(size)
    if size.is_Symbol:
        return make(aten.sym_size.int, *places[str(size)])
    first, *rest = (_worked_out(part, places, make) for part in size.args)
    for other in rest:
        first = make(operator.add if size.is_Add else operator.mul, first, other)
    return first


def _times(factors: Sequence[Any], make: Make) -> Any:
    """The product of sizes, its known part worked out."""
    number = 1
    free: list[Any] = []
    for factor in factors:
        if isinstance(factor, int):
            number *= factor
        else:
            free.append(factor)
    product = free[0] if free else number
    for factor in free[1:]:
        product = make(operator.mul, product, factor)
    return make(operator.mul, product, number) if free and number != 1 else product


def _flattened(given: Given, make: Make) -> list[Any]:
    x = given["self"]
    if rank(x) == 0:
        return [1]
    first, last = (positive_axis(given.get(name, default), rank(x)) for name, default in (("start_dim", 0), ("end_dim", -1)))
    kept = sizes(x, make)
    return [*kept[:first], _times(kept[first : last + 1], make), *kept[last + 1 :]]


def _unflattened(given: Given, make: Make) -> list[Any]:
    x, parts = given["self"], list(given["sizes"])
    axis = positive_axis(given["dim"], rank(x))
    kept = sizes(x, make)
    if -1 in parts:
        place = parts.index(-1)
        whole, rest = kept[axis], _times([part for part in parts if part != -1], make)
        known = isinstance(whole, int) and isinstance(rest, int)
        parts[place] = whole // rest if known else make(operator.floordiv, whole, rest)
    return [*kept[:axis], *parts, *kept[axis + 1 :]]


def _squeezed(given: Given, make: Make) -> list[Any]:
    x = given["self"]
    asked = _axes(given["dim"], rank(x)) if "dim" in given else range(rank(x))
    return [_size(x, axis, make) for axis, s in enumerate(shape(x)) if axis not in asked or not is_one(s)]


# -- the rest -------------------------------------------------------------------------------------------------------------


def _starts_at_a_place(given: Given) -> bool:
    return isinstance(given["start"], int) and given["start"] >= 0


def _narrowed(given: Given, make: Make) -> Call:
    start, length = given["start"], given["length"]
    end = start + length if isinstance(length, int) else make(operator.add, length, start)
    return aten.slice.Tensor, (given["self"], given["dim"], start, end)


def _concatenated(given: Given, make: Make) -> Call:
    return aten.cat.default, (given["tensors"], given["dim"])


SPELLINGS: Mapping[Any, Spelling] = MappingProxyType({
    aten.transpose.int: _permuted(_swapped("dim0", "dim1")),
    aten.swapdims.default: _permuted(_swapped("dim0", "dim1")),
    aten.swapaxes.default: _permuted(_swapped("axis0", "axis1")),
    aten.t.default: _permuted(_last_swapped),
    aten.mT.default: _permuted(_last_swapped),
    aten.numpy_T.default: _permuted(_reversed),
    aten.movedim.int: _permuted(_moved),
    aten.movedim.intlist: _permuted(_moved),
    aten.moveaxis.int: _permuted(_moved),
    aten.moveaxis.intlist: _permuted(_moved),
    aten.mH.default: Spelling(_adjoint),
    aten.matrix_H.default: Spelling(_adjoint),
    aten.adjoint.default: Spelling(_adjoint),
    aten.einsum.default: Spelling(_rearranged, _is_rearrangement),
    aten.view.default: _to_sizes(aten.reshape.default, _named),
    aten._unsafe_view.default: _to_sizes(aten.reshape.default, _named),
    aten.reshape_as.default: _to_sizes(aten.reshape.default, _of_other),
    aten.view_as.default: _to_sizes(aten.reshape.default, _of_other),
    aten.flatten.using_ints: _to_sizes(aten.reshape.default, _flattened),
    aten.ravel.default: _to_sizes(aten.reshape.default, _flattened),
    aten.unflatten.int: _to_sizes(aten.reshape.default, _unflattened),
    aten.squeeze.default: _to_sizes(aten.reshape.default, _squeezed),
    aten.squeeze.dim: _to_sizes(aten.reshape.default, _squeezed),
    aten.squeeze.dims: _to_sizes(aten.reshape.default, _squeezed),
    aten.expand_as.default: _to_sizes(aten.expand.default, _of_other),
    aten.broadcast_to.default: _to_sizes(aten.expand.default, _named),
    aten.concat.default: Spelling(_concatenated),
    aten.concatenate.default: Spelling(_concatenated),
    aten.narrow.default: Spelling(_narrowed, _starts_at_a_place),
})  # fmt: skip
"""The table."""
