"""What affine maps cost: multiplications for projections, numbers held for tables."""

from __future__ import annotations

from torch import fx

from normfuse.analysis.affine import AffineMap
from normfuse.analysis.projections import projection
from normfuse.analysis.windows import count
from normfuse.graph.node import aten, is_op, operand, rank, shape
from normfuse.ops.traits import Trait, is_a


def projections_in(m: AffineMap, weights: frozenset[fx.Node]) -> list[fx.Node]:
    """The projections of the model that a map is made of, in graph order."""
    return sorted(n for n in m.covers if projection(n, None, weights) is not None)


def dearer(m: AffineMap, node: fx.Node, weights: frozenset[fx.Node]) -> str | None:
    """Why one call for the map (its result is `node`) would cost more than its parts; None if it would not."""
    if m.table:
        return _larger(m, weights)
    places = count([s for i, s in enumerate(shape(node)) if i != m.axis])
    taps = count([w.size for w in m.windows])
    before = [_multiplications(n, weights) for n in projections_in(m, weights)]
    if places is None or taps is None or None in before:
        return None
    after, old = places * m.outputs * (m.inputs // m.groups) * taps, sum(n for n in before if n is not None)
    return f"one kernel would take {after} multiplications, the parts take {old}" if after > old else None


def _multiplications(node: fx.Node, weights: frozenset[fx.Node]) -> int | None:
    found = projection(node, None, weights)
    assert found is not None
    channels = 1 if is_a(node, Trait.CONVOLUTION) else rank(node) - 1
    places, size = count([s for i, s in enumerate(shape(node)) if i != channels]), count(shape(found.weight))
    return None if places is None or size is None else places * size


def _larger(m: AffineMap, weights: frozenset[fx.Node]) -> str | None:
    """A table of results holds more numbers than a narrow table and a projection."""
    tables = [n for n in m.covers if is_op(n, aten.embedding)]
    held = [count(shape(operand(n))) for n in tables]
    held += [count(shape(found.weight)) for n in m.covers if (found := projection(n, None, weights)) is not None]
    after, old = m.inputs * m.outputs, sum(n for n in held if n is not None)
    return f"one table would hold {after} numbers, the parts hold {old}" if after > old else None
