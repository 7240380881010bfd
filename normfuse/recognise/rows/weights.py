"""Weights that are functions of parameters: weight norm, spectral norm, weight standardization.

They need no operator: what depends on parameters alone is evaluated before the first input arrives. The inventory asks
here what a weight program computes, and the probe answers as it does for activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, fx

from normfuse.evaluate.sizes import Concrete, Impossible
from normfuse.graph.node import aten, is_op, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Roles, is_view, weight_only
from normfuse.graph.walk import behind
from normfuse.ops.traits import Trait, is_a
from normfuse.recognise.rows.choose import divisor_of, eps_of, literals
from normfuse.recognise.rows.experiment import Experiment, numel
from normfuse.recognise.rows.regions import Region, close
from normfuse.recognise.rows.rows import all_finite, changed_rows
from normfuse.recognise.rows.standardize import Standardisation, Standardised

_MOST = 200
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class WeightPattern:
    """What the weight program `node` does to a parameter."""

    kind: str
    node: fx.Node
    axes: tuple[int, ...]
    eps: float | None
    eps_place: str
    affine: str


def weight_patterns(program: Program) -> Iterator[WeightPattern]:
    """The normalised weights of a program in graph order, each once."""
    weights = weight_only(program)
    roles, known, seen = Roles(program), {}, set()  # type: ignore[var-annotated]
    concrete = Concrete(program, roles)
    for node in program.graph.nodes:
        if node in weights or not _multiplies(node):
            continue
        for operand in node.all_input_nodes:
            looks = _looks(operand) if operand in weights else []
            if not looks or looks[-1] in seen or looks[-1].op != "call_function":
                continue
            seen.add(looks[-1])
            for root, region in ((look, region) for look in looks for region in _regions(look, roles, concrete)):
                if region.key not in known:
                    known[region.key] = _identify(region, root, concrete)
                if known[region.key] is not None:
                    kind, axes, eps, place, affine = known[region.key]
                    yield WeightPattern(kind, root, axes, eps, place, affine)
                    break


def _multiplies(node: fx.Node) -> bool:
    return is_a(node, Trait.PROJECTION | Trait.PRODUCT) or is_op(node, aten.embedding, aten.einsum)


def _looks(node: fx.Node) -> list[fx.Node]:
    """The operand, and what it is a view of: a weight may be normalised in another shape than it is used in."""
    found = [node]
    while is_view(found[-1]) or is_op(found[-1], aten.to, aten.contiguous):
        source = found[-1].all_input_nodes[0] if found[-1].all_input_nodes else None
        if source is None or not isinstance(value(source), Tensor) or value(source).numel() != value(node).numel():
            break
        found.append(source)
    return found


def _regions(root: fx.Node, roles: Roles, concrete: Concrete) -> Iterator[Region]:
    """The root as a function of each stored tensor of its size."""
    order = sorted(islice(behind(root), _MOST))
    for leaf in order:
        if leaf.op != "get_attr" or shape(leaf) != shape(root) or not value(leaf).is_floating_point():
            continue
        inside: set[fx.Node] = {leaf}
        for node in order:
            if any(n in inside for n in node.all_input_nodes):
                inside.add(node)
        nodes = [n for n in order if n in inside and n is not leaf]
        region = Region(leaf, nodes, [], index={n: i + 1 for i, n in enumerate(nodes)})
        close(region, roles, concrete.describe)
        yield region


_Described = tuple[str, tuple[int, ...], float | None, str, str]
"""(kind, axes, eps, place of eps, affine)"""


def _identify(region: Region, root: fx.Node, concrete: Concrete) -> _Described | None:
    sizes = concrete.shape(region.source)
    if tuple(shape(root)) != sizes or not 4 <= numel(sizes) <= MAX_ELEMENTS:
        return None
    try:
        draws = Standardisation(Experiment(region, concrete, 11))
    except Impossible:
        return None
    if _is_spectral(draws, root):
        return "spectral_norm", (), None, "", "none"
    base = draws.moderate[0]
    before = draws.moderate_values[0].get(root)
    changed = base.clone()
    changed.view(-1)[base.numel() // 3] += 0.7
    after = draws.experiment.run(changed).get(root)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    rows = changed_rows(before, after, base.numel() // 3)
    if rows is None or rows.size == 1:
        return None
    found = draws.identify(root, rows)
    return None if isinstance(found, str) else _described(found, region, root)


def _described(found: Standardised, region: Region, root: fx.Node) -> _Described | None:
    n = found.rows.size
    axes = tuple(a - len(found.rows.shape) for a in found.rows.axes)
    affine = "none" if found.gain.side is None else "weight"
    if found.shift is not None or found.rows.split is not None:
        return None
    if found.form == "plain":
        placed, eps = eps_of(found, 1, literals(region))
        return ("weight_norm", axes, eps or None, placed.place, affine) if affine == "weight" else None
    if found.form != "centred":
        return None
    scale = abs(found.gain.scale)
    divisor = 1.0 if abs(scale - 1) < 1e-9 else divisor_of("centred", scale, n, region, root)[1]
    placed, eps = eps_of(found, divisor, literals(region))
    return "weight_standardization", axes, eps, placed.place, affine


def _is_spectral(draws: Standardisation, root: fx.Node) -> bool:
    """weight / sigma, where sigma is one number, linear in the weight."""
    run = draws.experiment.run
    one, two = draws.moderate[:2]
    inverses: list[Tensor] = []
    for x in (one, two, one + two):
        y = run(x).get(root)
        if not isinstance(y, Tensor) or y.shape != x.shape or not all_finite(y):
            return False
        ratios = x / y
        if not all_finite(ratios) or float((ratios - ratios.flatten()[0]).abs().amax()) > 1e-9 * float(ratios.abs().amax()):
            return False
        inverses.append(ratios.flatten()[0])
    a, b, both = (float(i) for i in inverses)
    moved = abs(a - b) > 1e-6 * max(abs(a), abs(b))
    return moved and abs(a + b - both) <= 1e-9 * max(abs(a), abs(b), abs(both))


__all__ = ["WeightPattern", "weight_patterns"]
