"""Where a factor on a tensor can go instead: back through linear operators into the weights that write the tensor.

Every linear operator lets a common factor through: of a sum both operands take it, of a product one. The way ends in
weights: of projections, embeddings, gains of norms, or parameters themselves. A tensor on the way may be read by nobody
off the way, because he would see the factor too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normfuse.analysis.projections import projection
from normfuse.analysis.streams import Writer
from normfuse.analysis.writers import Writers
from normfuse.graph.node import argument, arguments, aten, is_getitem, is_op, op_name, rank, readers, site
from normfuse.ops.traits import Trait, is_a, traits_of

_NORMS = Trait.ROW_NORM | Trait.GROUP_NORM | Trait.STORED_NORM | Trait.OWN_NORM


@dataclass
class Sources:
    """What must be scaled: projections, embeddings, pieces of projections, parameters by reader; norms with a gain."""

    writers: list[Writer] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    way: set[fx.Node] = field(default_factory=set)

    def copy(self) -> Sources:
        return Sources(list(self.writers), list(self.norms), set(self.way))


def sources_of(tensor: fx.Node, reader: fx.Node, known: Writers) -> Sources | str:
    """What writes `tensor`, of which `reader` alone wants a multiple; or why no weights can give it."""
    found = Sources()
    reason = _visit(tensor, found, known)
    if reason is not None:
        return reason
    for node in found.way:
        other = next((user for user in readers(node) if user is not reader and user not in found.way), None)
        if other is not None:
            return f"{op_name(node)} at {site(node)} is also read by {op_name(other)} at {site(other)}"
    return found


def _visit(node: fx.Node, found: Sources, known: Writers) -> str | None:
    if node in found.way:
        return None
    if is_getitem(node) and known.piece_of_projection(node, rank(node) - 1) is not None:
        found.way.add(node)
        found.writers.append(Writer(node, rank(node) - 1))
        return known.why_not(found.writers[-1])
    found.way.add(node)
    if projection(node, None, known.weights) is not None or _is_lookup(node, known):
        found.writers.append(Writer(node, 1 if is_a(node, Trait.CONVOLVING) else rank(node) - 1))
        return None
    if is_a(node, _NORMS) and argument(node, "weight") in known.weights:
        found.norms.append(node)
        return None
    if len(traits_of(node).linear) > 1:
        return _visit_product(node, found, known)
    operands = _operands(node)
    if operands is None:
        return f"{op_name(node)} at {site(node)} has no weights that could take the factor"
    return next((why for operand in operands if (why := _visit_operand(operand, node, found, known))), None)


def _is_lookup(node: fx.Node, known: Writers) -> bool:
    return is_op(node, aten.embedding) and argument(node, "weight") in known.weights


def _visit_operand(operand: fx.Node, reader: fx.Node, found: Sources, known: Writers) -> str | None:
    if operand in known.weights:
        found.writers.append(Writer(operand, rank(operand) - 1, reader))
        return None
    return _visit(operand, found, known)


def _visit_product(node: fx.Node, found: Sources, known: Writers) -> str | None:
    """One factor of a product takes it: the first that can."""
    reason = f"{op_name(node)} at {site(node)} has no factor that could take the factor"
    for factor in node.args[:2]:
        if not isinstance(factor, fx.Node) or factor in known.weights:
            continue
        attempt = found.copy()
        why = _visit(factor, attempt, known)
        if why is None:
            found.writers, found.norms, found.way = attempt.writers, attempt.norms, attempt.way
            return None
        reason = why
    return reason


def _operands(node: fx.Node) -> list[fx.Node] | None:
    """The operands that must all take the factor for the result to have it."""
    if is_getitem(node):
        return node.all_input_nodes[:1]
    groups, given = traits_of(node).linear, arguments(node)
    off = given.get("train") or given.get("rounding_mode") is not None
    if len(groups) != 1 or off:
        return None
    items = [item for name in groups[0] for item in _several(given.get(name))]
    operands = [item for item in items if isinstance(item, fx.Node)]
    return operands if len(operands) == len(items) else None


def _several(item: Any) -> Sequence[Any]:
    return item if isinstance(item, list | tuple) else [item]
