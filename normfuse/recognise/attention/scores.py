"""From the softmax back to the product: what happens to the scores on the way.

Scales, biases and masks are collected in order. What is the same for all keys of a query cancels in the softmax and is
dropped; what is neither a scale, a bias nor a mask is no attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.sizes import Concrete
from normfuse.graph.node import argument, arguments, aten, is_op, rank, shape, value
from normfuse.graph.roles import Role, Roles
from normfuse.recognise.attention.labels import Atoms, Labels, Product, aligned, behind, is_look, product_of

MASKING = -1e4
"""A score this low has no weight: exp of it is zero in every dtype."""
DROWNING = -1e30
"""Beside a number this low, a score is lost in rounding."""
_MAX_STEPS = 40


@dataclass
class Bias:
    """Added to the scores, times `factor`; where `fill` is given, the tensor is boolean and tells what is filled with it.

    `floor`: below this number the sum of scores and bias is not let fall.
    """

    node: fx.Node | None = None
    labels: Labels = field(default_factory=list)
    factor: float = 1.0
    fill: float | None = None
    keep: bool = False  # the boolean tensor tells what is kept, not what is filled
    floor: float = -math.inf

    def above(self, floor: float) -> Bias:
        return replace(self, floor=floor, fill=None if self.fill is None else max(self.fill, floor))


@dataclass
class Scores:
    """The product, its labels, and what stands between it and the softmax (last step first)."""

    product: Product
    labels: Labels
    scale: float = 1.0
    factors: list[tuple[fx.Node, Labels, bool]] = field(default_factory=list)  # (factor, labels, divides)
    biases: list[Bias] = field(default_factory=list)
    by_depth: bool = False  # divided by the root of the free size of the queries


class Reader:
    """Walks from the softmax's argument to the product of queries and keys."""

    def __init__(self, roles: Roles, concretes: Sequence[Concrete], atoms: Atoms) -> None:
        self.roles = roles
        self.concretes = concretes
        self.concrete = concretes[-1]
        self.atoms = atoms

    def read(self, node: fx.Node, labels: Labels, keys: tuple[int, ...]) -> Scores | str:
        scale, floor, factors, biases = 1.0, -math.inf, [], []  # type: ignore[var-annotated]
        for _ in range(_MAX_STEPS):
            product = product_of(node)
            if product is not None:
                if product.added is not None:
                    biases.append(Bias(product.added, aligned(product.added, labels), scale))
                found = Scores(product, self.atoms.settled(labels), scale * product.scale, factors, biases)
                return self._with_default_scale(found)
            if is_look(node):
                step = behind(node, labels, self.atoms)
                if step is None:
                    return "a view between product and softmax cannot be followed"
                node, labels = step
                continue
            clamped = self._clamped(node)
            if clamped is not None and scale > 0:
                node, low = clamped
                floor = max(floor, low * scale)
                continue
            found = self._step(node, labels, keys, scale)
            if isinstance(found, str):
                return found
            node, by, factor, bias = found
            if bias is not None and factors:
                return "a bias or a mask is scaled by a tensor afterwards"
            scale *= by
            if factor is not None:
                factors.append(factor)
            if bias is not None:
                biases.append(bias.above(floor))
            labels = self._narrowed(node, labels)
        return "the product is too far away"

    def _clamped(self, node: fx.Node) -> tuple[fx.Node, float] | None:
        """max(scores, low), where low is so low that it changes no score that has a weight beside others."""
        if is_op(node, aten.clamp, aten.clamp_min):
            path, low = node.args[0], argument(node, "min")
            if is_op(node, aten.clamp) and argument(node, "max") is not None:
                return None
        elif is_op(node, aten.maximum) or (is_op(node, aten.max) and len(node.args) == 2):
            found = self._operands(node)
            if found is None:
                return None
            path, low, _ = found
        else:
            return None
        number = self.number(low)
        return (path, number) if number is not None and number <= DROWNING else None  # type: ignore[return-value]

    def _with_default_scale(self, found: Scores) -> Scores:
        """One over the root of a size that differs from input to input is torch's own scale, if it is that of q."""
        product = found.product
        depth = next(
            s for s, letter in zip(shape(product.a), product.letters_a, strict=True) if letter not in product.letters_out
        )
        for factor in found.factors:
            node, _, divides = factor
            if rank(node) == 0 and all(self._is_root(node, depth, divides, c) for c in self.concretes):
                found.factors.remove(factor)
                found.by_depth = True
                break
        return found

    @staticmethod
    def _is_root(node: fx.Node, depth: Any, divides: bool, concrete: Concrete) -> bool:
        try:
            known, root = float(concrete.fixed(node)), math.sqrt(concrete.size(depth))
        except Exception:
            return False
        return abs(known - (root if divides else 1 / root)) < 1e-12

    @staticmethod
    def _narrowed(node: fx.Node, labels: Labels) -> Labels:
        return labels if rank(node) == len(labels) else labels[len(labels) - rank(node) :]

    def _step(self, node: fx.Node, labels: Labels, keys: tuple[int, ...], scale: float) -> Any:
        """(operand, number it is scaled by, tensor it is scaled by, bias) or why not."""
        if is_op(node, aten.mul, aten.div):
            return self._scaled(node, labels)
        if is_op(node, aten.add, aten.sub) and argument(node, "alpha") == 1:
            return self._biased(node, labels, keys, scale)
        if is_op(node, aten.masked_fill):
            given = arguments(node)
            return self._filled(given["self"], given["mask"], given["value"], labels, scale, keep=False)
        if is_op(node, aten.where) and len(node.args) == 3:
            condition, yes, no = node.args
            for path, fill, keep in ((yes, no, True), (no, yes, False)):
                if isinstance(path, fx.Node) and self._is_path(path):
                    return self._filled(path, condition, fill, labels, scale, keep=keep)
        if is_op(node, aten.neg):
            return node.args[0], -1.0, None, None
        return f"{node.target} stands between product and softmax"

    def _is_path(self, node: Any) -> bool:
        """Does a product lie behind it?"""
        for _ in range(_MAX_STEPS):
            if not isinstance(node, fx.Node) or self.roles(node) is not Role.ACTIVATION:
                return False
            if product_of(node) is not None:
                return True
            inputs = [n for n in node.all_input_nodes if self.roles(n) is Role.ACTIVATION]
            if not inputs or not (is_look(node) or is_op(node, *_STEPS)):
                return False
            if len(inputs) > 1:
                return any(self._is_path(n) for n in inputs)
            node = inputs[0]
        return False

    def _operands(self, node: fx.Node) -> tuple[fx.Node, Any, bool] | None:
        """(path, the other operand, was the path first?)"""
        first, second = node.args[:2]
        if self._is_path(first):
            return first, second, True  # type: ignore[return-value]
        return (second, first, False) if self._is_path(second) else None  # type: ignore[return-value]

    def _scaled(self, node: fx.Node, labels: Labels) -> Any:
        found = self._operands(node)
        divides = is_op(node, aten.div)
        if found is None or (divides and (not found[2] or arguments(node).get("rounding_mode") is not None)):
            return "no product lies behind the softmax"
        path, other, _ = found
        number = self.number(other)
        if number is not None:
            return path, (1 / number if divides else number), None, None
        if not isinstance(other, fx.Node):
            return "the scores are scaled by something unknown"
        if rank(other) == 0:
            return path, 1.0, (other, [], divides), None
        return path, 1.0, (other, aligned(other, labels), divides), None

    def _biased(self, node: fx.Node, labels: Labels, keys: tuple[int, ...], scale: float) -> Any:
        found = self._operands(node)
        if found is None:
            return "no product lies behind the softmax"
        path, other, first = found
        minus = is_op(node, aten.sub)
        if minus and not first:
            return "the scores are subtracted"
        if not isinstance(other, fx.Node) or rank(other) == 0:
            return path, 1.0, None, None  # a number added to all scores
        if (by_arithmetic := self._mask_by_arithmetic(path, other, labels, -scale if minus else scale)) is not None:
            return by_arithmetic
        own = self.atoms.settled(aligned(other, labels))
        if not set(self.atoms.leaves(keys)) & {a for axis in own for a in axis}:
            return path, 1.0, None, None  # the same for all keys
        return path, 1.0, None, Bias(other, own, -scale if minus else scale)

    def _mask_by_arithmetic(self, path: fx.Node, added: fx.Node, labels: Labels, scale: float) -> Any:
        """scores * b + low * (1 - b) with a fixed b of zeros and ones: a fill where b is zero."""
        found = self._operands(path) if is_op(path, aten.mul) else None
        if found is None or not isinstance(found[1], fx.Node):
            return None
        scores, mask, _ = found
        if self.roles(mask) is not Role.FIXED or self.roles(added) is not Role.FIXED:
            return None
        for concrete in self.concretes:
            try:
                b, low = torch.broadcast_tensors(concrete.fixed(mask), concrete.fixed(added))
            except Exception:
                return None
            low = low * scale
            ones = b == 1
            if not bool((ones | (b == 0)).all()) or bool((low[ones] != 0).any()) or bool((low[~ones] > MASKING).any()):
                return None
        return scores, 1.0, None, Bias(mask, aligned(mask, labels), 1.0, MASKING, keep=True)

    def _filled(self, path: Any, mask: Any, fill: Any, labels: Labels, scale: float, *, keep: bool) -> Any:
        number = self.number(fill)
        number = None if number is None else number * scale
        if number is None or not isinstance(mask, fx.Node) or not isinstance(path, fx.Node):
            return "masked scores are filled with something unknown"
        if number > MASKING:
            return f"masked scores are filled with {number:g}, which still has a weight"
        return path, 1.0, None, Bias(mask, aligned(mask, labels), 1.0, number, keep)

    def number(self, item: Any) -> float | None:
        """A literal, a size, or a tensor all of whose entries are one fixed number."""
        if isinstance(item, bool):
            return None
        if isinstance(item, int | float):
            return float(item)
        if not isinstance(item, fx.Node) or self.roles(item) not in (Role.FIXED, Role.SIZE):
            return None
        if self.roles(item) is Role.SIZE and self._is_free(item):
            return None
        found = {self._number_at(item, concrete) for concrete in self.concretes}
        return found.pop() if len(found) == 1 else None  # a number that differs from size to size is none

    @staticmethod
    def _number_at(item: fx.Node, concrete: Concrete) -> float | None:
        try:
            known = concrete.fixed(item)
        except Exception:
            return None
        if isinstance(known, int | float):
            return float(known)
        if not isinstance(known, Tensor) or not known.is_floating_point() or known.numel() == 0:
            return None
        first = known.flatten()[0]
        return float(first) if bool((known == first).all()) else None

    @staticmethod
    def _is_free(item: fx.Node) -> bool:
        """A size that differs from input to input is no number."""
        v = value(item)
        expr = v.node.expr if isinstance(v, torch.SymInt | torch.SymFloat) else None
        return expr is not None and not expr.is_number


_STEPS = (
    aten.mul, aten.div, aten.add, aten.sub, aten.masked_fill, aten.where, aten.neg, aten.max, aten.maximum, aten.clamp,
    aten.clamp_min,
)  # fmt: skip


def values_of(bias: Bias, concrete: Concrete) -> Tensor | None:
    """What a fixed bias adds at the sizes of `concrete`: zero where kept, minus infinity where masked."""
    assert bias.node is not None
    try:
        known = concrete.fixed(bias.node)
    except Exception:
        return None
    if bias.fill is not None:
        masked = ~known.bool() if bias.keep else known.bool()
        return torch.zeros(known.shape, dtype=torch.float64).masked_fill(masked, -math.inf)
    added = known.double() * bias.factor
    return torch.where(added <= MASKING, -math.inf, added)


def is_causal(table: Tensor) -> bool:
    """Zero on and below the diagonal, minus infinity above it."""
    if table.dim() < 2 or table.shape[-1] != table.shape[-2] or table[..., 0].numel() != table.shape[-1]:
        return False
    square = table.reshape(table.shape[-2:])
    n = square.shape[0]
    want = torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)
    return n > 1 and torch.equal(square, want)


def some_row_is_empty(table: Tensor) -> bool:
    return bool((table == -math.inf).all(-1).any())


def static_numel(node: fx.Node) -> int | None:
    sizes = shape(node)
    return math.prod(int(s) for s in sizes) if all(isinstance(s, int) for s in sizes) else None
