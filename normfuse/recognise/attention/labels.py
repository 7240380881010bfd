"""Where axes go: views and permutations followed by labels, products of two tensors in one form.

Every axis of a tensor carries a tuple of *atoms*: what it is made of. A reshape that joins axes joins their atoms, one
that parts an axis parts its atoms; an axis of size one carries none. So two tensors far apart in the graph can be told
to share an axis whatever views, transposes and einsums stand between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx

from normfuse.graph.node import (
    argument,
    arguments,
    aten,
    expression,
    is_one,
    is_op,
    operand,
    positive_axis,
    rank,
    same_size,
    shape,
    value,
)
from normfuse.ops.traits import Trait, is_a

Labels = list[tuple[int, ...]]


class Atoms:
    """Atoms with their sizes; an atom may turn out to consist of smaller ones."""

    def __init__(self) -> None:
        self.sizes: list[Any] = []
        self._parts: dict[int, tuple[int, ...]] = {}

    def fresh(self, size: Any) -> tuple[int, ...]:
        if is_one(size):
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def of(self, node: fx.Node) -> Labels:
        return [self.fresh(s) for s in shape(node)]

    def leaves(self, atoms: Sequence[int]) -> tuple[int, ...]:
        found: list[int] = []
        for atom in atoms:
            found.extend(self.leaves(self._parts[atom]) if atom in self._parts else (atom,))
        return tuple(found)

    def settled(self, labels: Labels) -> Labels:
        return [self.leaves(axis) for axis in labels]

    def split(self, atom: int, first: Any, second: Any) -> tuple[int, int]:
        self.sizes += [first, second]
        parts = len(self.sizes) - 2, len(self.sizes) - 1
        self._parts[atom] = parts
        return parts

    # -- reshapes

    def reshaped(self, known: Labels, have: Sequence[Any], want: Sequence[Any]) -> Labels | None:
        """The labels of a tensor of shape `want` from those of the same elements in shape `have`."""
        found = self._by_sizes(known, have, want)
        return found if found is not None else self._by_ends(known, have, want)

    def _by_ends(self, known: Labels, have: Sequence[Any], want: Sequence[Any]) -> Labels | None:
        """Where sizes cannot be compared: equal ends, and one axis between them that is several on the other side."""
        front = 0
        while front < min(len(have), len(want)) and same_size(have[front], want[front]):
            front += 1
        back = 0
        while back < min(len(have), len(want)) - front and same_size(have[-1 - back], want[-1 - back]):
            back += 1
        end, other = len(have) - back, len(want) - back
        inner = [a for axis in known[front:end] for a in self.leaves(axis)]
        if other - front == 1:
            middle: Labels = [tuple(inner)]
        elif end - front == 1 and other - front == 2 and len(inner) == 1:
            first, second = self.split(inner[0], *(expression(s) for s in want[front:other]))
            middle = [(first,), (second,)]
        else:
            return None
        return [*known[:front], *middle, *known[end:]]

    def _by_sizes(self, known: Labels, have: Sequence[Any], want: Sequence[Any]) -> Labels | None:
        result: Labels = []
        i = j = 0
        while i < len(have) or j < len(want):
            if j < len(want) and is_one(want[j]):
                result.append(())
                j += 1
                continue
            if i < len(have) and is_one(have[i]):
                i += 1
                continue
            if i >= len(have) or j >= len(want):
                return None
            left, right, a, b = expression(have[i]), expression(want[j]), i + 1, j + 1
            while not same_size(left, right):
                if _divides(right, left) and b < len(want):
                    right, b = right * expression(want[b]), b + 1
                elif a < len(have):
                    left, a = left * expression(have[a]), a + 1
                else:
                    return None
            atoms = [x for axis in known[i:a] for x in self.leaves(axis)]
            spread = self._spread(atoms, want[j:b])
            if spread is None:
                return None
            result += spread
            i, j = a, b
        return result

    def _spread(self, atoms: list[int], sizes: Sequence[Any]) -> Labels | None:
        result: Labels = []
        pending = list(atoms)
        for size in sizes:
            if is_one(size):
                result.append(())
                continue
            taken: list[int] = []
            left = expression(size)
            while not same_size(left, 1):
                if not pending:
                    return None
                atom = pending.pop(0)
                own = expression(self.sizes[atom])
                if _divides(own, left):
                    taken.append(atom)
                    left = _quotient(left, own)
                elif _divides(left, own):
                    first, second = self.split(atom, left, _quotient(own, left))
                    taken.append(first)
                    pending.insert(0, second)
                    left = 1
                else:
                    return None
            result.append(tuple(taken))
        return result if not pending else None


def _divides(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return b % a == 0
    return bool(sympy.fraction(sympy.cancel(sympy.sympify(b) / sympy.sympify(a)))[1] == 1)


def _quotient(b: Any, a: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return b // a
    ratio = sympy.cancel(sympy.sympify(b) / sympy.sympify(a))
    return int(ratio) if ratio.is_number else ratio


# -- one operator -------------------------------------------------------------------------------------------------

_SAME = Trait.COPY | Trait.CAST


def is_look(node: fx.Node) -> bool:
    """A view, a permutation, a cast, or dropout that is off."""
    if is_op(node, aten.dropout):
        return argument(node, "train") is False
    return is_a(node, Trait.RESHAPE | Trait.EXPAND | _SAME) or order_of(node) is not None


def order_of(node: fx.Node) -> list[int] | None:
    """The permutation that the operator is."""
    return [positive_axis(d, rank(node)) for d in argument(node, "dims")] if is_op(node, aten.permute) else None


def behind(node: fx.Node, labels: Labels, atoms: Atoms) -> tuple[fx.Node, Labels] | None:
    """The operand of a look with its labels."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_look(node) or not isinstance(value(source), Tensor):
        return None
    order = order_of(node)
    if order is not None:
        back: Labels = [()] * len(order)
        for place, axis in enumerate(order):
            back[axis] = labels[place]
        return source, back
    if is_op(node, aten.expand):
        return source, aligned(source, labels)
    if is_a(node, Trait.RESHAPE):
        found = atoms.reshaped(labels, shape(node), shape(source))
        return None if found is None else (source, found)
    return source, labels


def ahead(node: fx.Node, labels: Labels, atoms: Atoms) -> Labels | None:
    """The labels of a look's result from those of its operand."""
    if not is_look(node) or is_op(node, aten.expand):
        return None
    order = order_of(node)
    if order is not None:
        return [labels[a] for a in order]
    if is_a(node, Trait.RESHAPE):
        return atoms.reshaped(labels, shape(operand(node)), shape(node))
    return labels


def aligned(operand: fx.Node, labels: Labels) -> Labels:
    """The labels of an operand that broadcasts to a result with these labels."""
    own = shape(operand)
    mine = labels[len(labels) - len(own) :] if own else []
    return [() if is_one(s) else axis for s, axis in zip(own, mine, strict=True)]


# -- products -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """out = sum over letters of a * b; one letter for each axis, None for an axis of size one."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    letters_a: tuple[Any, ...]
    letters_b: tuple[Any, ...]
    letters_out: tuple[Any, ...]
    scale: float = 1.0
    added: fx.Node | None = None


def product_of(node: fx.Node) -> Product | None:
    """The product of two tensors that a node is, however it is spelt."""
    if is_op(node, aten.matmul, aten.bmm, aten.mm):
        given = list(arguments(node).values())
        return _matmul(node, given[0], given[1])
    if is_op(node, aten.baddbmm):
        given_by_name = arguments(node)
        found = _matmul(node, given_by_name["batch1"], given_by_name["batch2"])
        beta, alpha = given_by_name["beta"], given_by_name["alpha"]
        if found is None or beta not in (0, 1) or not isinstance(alpha, int | float):
            return None
        added = given_by_name["self"] if beta == 1 else None
        return Product(node, found.a, found.b, found.letters_a, found.letters_b, found.letters_out, float(alpha), added)
    if is_op(node, aten.einsum):
        return _einsum(node)
    if is_op(node, aten.sum):
        return _multiplied_and_summed(node)
    return None


def _matmul(node: fx.Node, a: Any, b: Any) -> Product | None:
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or rank(a) < 2 or rank(b) < 2:
        return None
    lead = rank(node) - 2
    out = (*(("n", i) for i in range(lead)), "i", "j")
    letters_a = _thin(a, (*out[lead - (rank(a) - 2) : lead], "i", "d"))
    letters_b = _thin(b, (*out[lead - (rank(b) - 2) : lead], "d", "j"))
    return Product(node, a, b, letters_a, letters_b, _thin(node, out))


def _thin(node: fx.Node, letters: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if is_one(s) else letter for s, letter in zip(shape(node), letters, strict=True))


def _einsum(node: fx.Node) -> Product | None:
    equation, tensors = node.args[0], node.args[1]
    if not isinstance(equation, str) or len(tensors) != 2:  # type: ignore[arg-type]
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if not arrow or len(parts) != 2:
        return None
    a, b = tensors  # type: ignore[misc]
    spelt = [_letters(part, rank(n)) for part, n in ((parts[0], a), (parts[1], b), (out, node))]  # type: ignore[arg-type]
    if any(s is None or len(set(s)) != len(s) for s in spelt):
        return None
    one, two, three = (_thin(n, s) for n, s in zip((a, b, node), spelt, strict=True))  # type: ignore[arg-type]
    return Product(node, a, b, one, two, three)  # type: ignore[arg-type]


def _letters(part: str, ndim: int) -> tuple[Any, ...] | None:
    if "..." not in part:
        return tuple(part) if len(part) == ndim else None
    before, _, after = part.partition("...")
    dots = ndim - len(before) - len(after)
    return (*before, *(("n", i - dots) for i in range(dots)), *after) if dots >= 0 else None


def _multiplied_and_summed(node: fx.Node) -> Product | None:
    factors = node.args[0]
    if not isinstance(factors, fx.Node) or not is_op(factors, aten.mul) or len(factors.all_input_nodes) != 2:
        return None
    a, b = factors.args[:2]
    dims = argument(node, "dim")
    if not dims or not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or rank(a) != rank(b):
        return None
    letters = list(range(rank(factors)))
    gone = {positive_axis(d, rank(factors)) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = argument(node, "keepdim")
    out = [i for i in letters if kept or i not in gone]
    return Product(node, a, b, _thin(a, letters), _thin(b, letters), _thin(node, out))
