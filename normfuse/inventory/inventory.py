"""Inventory: the norms, softmaxes and attentions of a model, counted once each however they are spelt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import fx

from normfuse.analysis.affine import Affine, AffineMap, Channelwise, Composed, Own, Sum
from normfuse.analysis.costs import projections_in
from normfuse.graph.node import argument, arguments, aten, is_op, readers, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.graph.walk import behind
from normfuse.inventory.costs import bytes_of, count, flop_of, weight_cost
from normfuse.inventory.pattern import Pattern, kinds
from normfuse.inventory.placement import Placement
from normfuse.inventory.table import page_of
from normfuse.ops import Operator, operator_of
from normfuse.ops.traits import Trait, is_a
from normfuse.recognise.attention.one_key import is_over_one_key
from normfuse.recognise.rows.further import named_functions
from normfuse.recognise.rows.weights import weight_patterns
from normfuse.show.page import Page

_WITHOUT_COST = ("branches", "lora")
"""They cost what their last sum does: the projections in them are no patterns."""
_SOFTMAX = 5
"""Operations on each element of what has only a name: about those of a softmax."""


@dataclass
class Inventory:
    """All patterns in graph order. `count(kind)`, a table by `str()`, plain data by `to_dict()`."""

    model: str = ""
    patterns: list[Pattern] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def count(self, kind: str) -> int:
        """How many patterns of a kind there are. Raises `ValueError` for a kind that does not exist."""
        found = self.counts()[kind]
        if not found and kind not in kinds():
            raise ValueError(f"there is no kind {kind!r}: the kinds are {', '.join(kinds())}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data: counts by kind, totals, every pattern."""
        return {
            "model": self.model,
            "counts": dict(self.counts()),
            "bytes": sum(p.bytes for p in self.patterns),
            "flop": sum(p.flop for p in self.patterns),
            "patterns": [asdict(p) for p in self.patterns],
            "notes": list(self.notes),
        }

    def counts(self) -> Counter[str]:
        return Counter(p.kind for p in self.patterns)

    def __str__(self) -> str:
        from normfuse.show.terminal import render

        return render(self.page())

    def page(self) -> Page:
        """A table for the printers in `show`: like patterns in one row, the total below."""
        return page_of(self.model, self.patterns, self.notes)


def take_inventory(program: Program, model: str = "") -> Inventory:
    """The inventory of a raised program."""
    return Inventory(model, list(_patterns(program)), (*program.notes, *_unnamed(program)))


def _unnamed(program: Program) -> Iterator[str]:
    """Norms that are one operator, but none of the kinds."""
    for node in program.graph.nodes:
        record = operator_of(node.target)
        if record is not None and (given := arguments(node)).get("ddof") and record.kind_of(given) is None:
            axes, eps = list(record.axes_of(given, shape(node))), record.eps_of(given)
            yield f"{site(node)} divides by the unbiased deviation over {axes} (eps {eps}): a norm, but none of the kinds"


def _patterns(program: Program) -> Iterator[Pattern]:
    weights = weight_only(program)
    normalised = list(weight_patterns(program))
    parts = set(behind(*(found.node for found in normalised)))
    placement = Placement(program)
    named = {found.node: found for found in named_functions(program)}
    steps = {n for found in named.values() for n in found.inside if n is not found.node}
    parts |= {n for n in steps if not is_op(n, aten.softmax)}  # over more scores than are kept, a softmax all the same
    sums = dict(_sums(program))
    parts |= {m.node for _, m in sums.values() if m.node is not None}
    for node in program.graph.nodes:
        kind = _kind(node, weights)
        if kind is not None and node not in parts:
            yield _pattern(kind, node, placement, weights)
        if node in named and node not in parts:
            yield Pattern(named[node].kind, site(node), bytes=bytes_of(node), flop=_SOFTMAX * count(node))
        if node in sums:
            kind, m = sums[node]
            inner = node if m.node is None else m.node
            found = _pattern(kind, inner, placement, weights)
            yield replace(found, site=site(node), bytes=found.bytes + (node is not inner) * bytes_of(node))
    for found in normalised:
        cost = weight_cost(found.kind, found.node)
        place = found.eps_place if found.eps is not None else ""
        yield Pattern(found.kind, site(found.node), found.axes, found.eps, place, found.affine, "other", *cost)


def _sums(program: Program) -> Iterator[tuple[fx.Node, tuple[str, AffineMap]]]:
    """Sums of maps of one tensor that have a name, the largest of nested ones.

    Of `rep_batch_norm` the map is that of its norm; else its node is not asked for.
    """
    affine, within = Affine(program), set[fx.Node]()
    for node in reversed(list(program.graph.nodes)):
        if node in within or not is_op(node, aten.add, aten.sub, aten.rsub, aten.addcmul, aten.lerp):
            continue
        for term in affine(node):
            kind = _sum_kind(term.map, affine) if isinstance(term.map.recipe, Sum) else None
            if kind is None:
                continue
            within |= term.map.covers
            norm = next((n for n in term.map.covers if is_op(n, aten.batch_norm)), None)
            yield node, (kind, AffineMap(term.map.source, term.map.recipe, norm if kind == "rep_batch_norm" else None))


def _sum_kind(m: AffineMap, affine: Affine) -> str | None:
    norms = sum(is_op(n, aten.batch_norm) for n in m.covers)
    if m.diagonal:
        return "rep_batch_norm" if norms == 1 else None
    if is_narrow(m) and is_full(m):
        return "lora"
    return "branches" if projections_in(m, affine.weights) and not m.table else None


def is_narrow(m: AffineMap) -> bool:
    """Does some summand go through fewer channels than it reads and writes?"""
    recipe = m.recipe
    if isinstance(recipe, Sum):
        return any(is_narrow(t.map) for t in recipe.terms)
    if isinstance(recipe, Channelwise):
        return is_narrow(recipe.inner)
    if not isinstance(recipe, Composed) or recipe.outer.diagonal or recipe.inner.diagonal:
        return False
    return recipe.outer.inputs < min(recipe.inner.inputs, recipe.outer.outputs)


def is_full(m: AffineMap) -> bool:
    """Is some summand a projection or an embedding with weights of its own?"""
    recipe = m.recipe
    if isinstance(recipe, Sum):
        return any(is_full(t.map) for t in recipe.terms)
    return is_full(recipe.inner) if isinstance(recipe, Channelwise) else isinstance(recipe, Own)


def _kind(node: fx.Node, weights: frozenset[fx.Node]) -> str | None:
    record = operator_of(node.target)
    if record is None or any(argument(node, name) not in weights for name in record.fixed):
        return None
    return "attention" if is_over_one_key(node) else record.kind_of(arguments(node))


def _pattern(kind: str, node: fx.Node, placement: Placement, weights: frozenset[fx.Node]) -> Pattern:
    if kind in _WITHOUT_COST:
        return Pattern(kind, site(node), bytes=bytes_of(node), flop=count(node))
    record = operator_of(node.target)
    assert record is not None
    given = arguments(node)
    counted = kind in (record.kind_of(given), "rep_batch_norm")
    axes, eps = (record.axes_of(given, shape(node)), record.eps_of(given)) if counted else ((), None)
    place = "" if eps is None else str(given[record.place]) if record.place else "inside"
    role = placement(node) if record.role in ("norm", "squash") else "other"
    cost = bytes_of(node), flop_of(record, node)
    return Pattern(kind, site(node), axes, eps, place, _affine(record, node, weights), role, *cost)


def _affine(record: Operator, node: fx.Node, weights: frozenset[fx.Node]) -> str:
    """Gain and shift of the model: the operator's own, or those that follow it."""
    if record.role not in ("norm", "squash"):
        return ""
    names = {"weight": record.gain, "bias": record.shift}
    has = {name for name, own in names.items() if own is not None and argument(node, own) in weights}
    if record.role == "norm":
        has |= _following(node, weights)
    return " and ".join(name for name in names if name in has) or "none"


_LOOKS = Trait.WHOLE | Trait.CAST | Trait.COPY


def _following(node: fx.Node, weights: frozenset[fx.Node]) -> set[str]:
    """A gain and a shift by weights right behind the norm, that nothing else stands between."""
    found: set[str] = set()
    while len(users := readers(node)) == 1:
        user = users[0]
        by_weight = any(n in weights for n in user.all_input_nodes)
        if is_op(user, aten.mul) and by_weight and not found:
            found.add("weight")
        elif is_op(user, aten.add) and by_weight and "bias" not in found:
            found.add("bias")
        elif not is_a(user, _LOOKS) and not (is_op(user, aten.mul, aten.div) and len(user.all_input_nodes) == 1):
            break
        node = user
    return found


__all__ = ["Inventory", "Pattern", "kinds", "take_inventory"]
