"""Inventory: the norms, softmaxes and attentions of a model, counted once each however they are spelt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from normfuse.graph.node import argument, arguments, aten, is_op, rank, readers, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.graph.walk import behind
from normfuse.inventory.costs import bytes_of, flop_of, weight_cost
from normfuse.inventory.pattern import KINDS, Pattern
from normfuse.inventory.placement import Placement
from normfuse.inventory.table import page_of
from normfuse.ops.norms import CRMS_NORM, L2_NORM, RMS_NORM, STANDARDIZE
from normfuse.ops.softmax import SOFTMAX_OVER
from normfuse.ops.squash import DERF, DYT
from normfuse.ops.traits import Trait, is_a
from normfuse.recognise.attention.one_key import is_over_one_key
from normfuse.recognise.rows.weights import weight_patterns
from normfuse.show.page import Page

_OPERATORS = {
    "layer_norm": (aten.layer_norm,),
    "rms_norm": (RMS_NORM, aten.rms_norm),
    "crms_norm": (CRMS_NORM,),
    "l2_norm": (L2_NORM,),
    "dyt": (DYT,),
    "derf": (DERF,),
    "batch_norm": (aten.batch_norm,),
    "group_norm": (aten.group_norm,),
    "instance_norm": (aten.instance_norm,),
    "softmax": (aten.softmax, aten._softmax, aten.log_softmax, SOFTMAX_OVER),
    "attention": (aten.scaled_dot_product_attention,),
}  # fmt: skip


@dataclass
class Inventory:
    """All patterns in graph order. `count(kind)`, a table by `str()`, plain data by `to_dict()`."""

    model: str = ""
    patterns: list[Pattern] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def count(self, kind: str) -> int:
        """How many patterns of a kind there are. Raises `ValueError` for a kind that does not exist."""
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}: the kinds are {', '.join(KINDS)}")
        return sum(1 for p in self.patterns if p.kind == kind)

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
        if is_op(node, STANDARDIZE) and argument(node, "ddof"):
            axes, eps = argument(node, "axes"), argument(node, "eps")
            yield f"{site(node)} divides by the unbiased deviation over {axes} (eps {eps}): a norm, but none of the kinds"


def _patterns(program: Program) -> Iterator[Pattern]:
    weights = weight_only(program)
    normalised = list(weight_patterns(program))
    parts = set(behind(*(found.node for found in normalised)))
    placement = Placement(program)
    for node in program.graph.nodes:
        kind = _kind(node, weights)
        if kind is not None and node not in parts:
            yield _pattern(kind, node, placement, weights)
    for found in normalised:
        cost = weight_cost(found.kind, found.node)
        yield Pattern(found.kind, site(found.node), found.axes, found.eps, found.affine, "other", *cost)


def _kind(node: fx.Node, weights: frozenset[fx.Node]) -> str | None:
    if is_op(node, STANDARDIZE):
        if argument(node, "ddof"):
            return None  # by another deviation: no norm of that name, though it is one operator now
        return "layer_norm" if argument(node, "centre") else "rms_norm"
    if is_op(node, aten.batch_norm) and (argument(node, "training") or argument(node, "running_mean") not in weights):
        return None
    if is_over_one_key(node):
        return "attention"
    return next((kind for kind, packets in _OPERATORS.items() if is_op(node, *packets)), None)


def _pattern(kind: str, node: fx.Node, placement: Placement, weights: frozenset[fx.Node]) -> Pattern:
    axes, eps = _axes_and_eps(kind, node)
    role = "other" if kind in ("softmax", "attention") else placement(node)
    return Pattern(kind, site(node), axes, eps, _affine(kind, node, weights), role, bytes_of(node), flop_of(kind, node))


def _axes_and_eps(kind: str, node: fx.Node) -> tuple[tuple[int, ...], float | None]:
    if is_op(node, aten.layer_norm, aten.rms_norm):
        return tuple(range(-len(argument(node, "normalized_shape")), 0)), argument(node, "eps")
    if is_op(node, RMS_NORM) or is_a(node, Trait.OWN_NORM | Trait.UNIT_NORM):
        return tuple(argument(node, "axes")), argument(node, "eps")
    if is_op(node, SOFTMAX_OVER):
        return tuple(argument(node, "axes")), None
    if kind == "softmax" and is_op(node, *_OPERATORS["softmax"]):
        return (_negative(int(argument(node, "dim")), node),), None
    if kind in ("batch_norm", "instance_norm", "group_norm"):
        first = {"batch_norm": (0, *range(2, rank(node))), "group_norm": tuple(range(1, rank(node)))}
        if kind == "group_norm" and argument(node, "num_groups") == shape(node)[1]:
            first = {}
        axes = first.get(kind, tuple(range(2, rank(node))))
        return tuple(_negative(a, node) for a in axes), argument(node, "eps")
    return (), None


def _negative(axis: int, node: fx.Node) -> int:
    return axis - rank(node) if axis >= 0 else axis


def _affine(kind: str, node: fx.Node, weights: frozenset[fx.Node]) -> str:
    """Gain and shift of the model: the operator's own, or those that follow it."""
    if kind in ("softmax", "attention", "weight_norm"):
        return ""
    own = {name for name in ("weight", "bias") if arguments(node).get(name) in weights}
    has = own | _following(node, weights) if kind not in ("dyt", "derf") else own
    return " and ".join(name for name in ("weight", "bias") if name in has) or "none"


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


__all__ = ["KINDS", "Inventory", "Pattern", "take_inventory"]
