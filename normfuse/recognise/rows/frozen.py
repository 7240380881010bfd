"""raise_frozen_batch_norm:  (x - mean) / sqrt(var + eps) * gain + shift, all of them stored  ->  batch_norm

Exactness: algebraic.
Legal if:  result and source are in a linear relation whose factor is gain / sqrt(var + eps) and whose constant is
           shift - mean * factor for all values of these tensors, one entry of each for each channel.
Leaves alone: a gain and a shift without statistics (LayerScale); statistics of the present batch.
Reference: METHODS 1.4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.analysis import Facts
from normfuse.evaluate.promote import in_float64, promote
from normfuse.evaluate.sizes import Concrete, Impossible
from normfuse.graph.node import aten, is_op, rank, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Role, Roles
from normfuse.graph.walk import walk
from normfuse.ops.traits import Trait, is_a
from normfuse.recognise.rows.choose import snapped
from normfuse.recognise.rows.emit import moved_axis
from normfuse.recognise.rows.experiment import Experiment
from normfuse.recognise.rows.regions import Region, region_from, sources_of
from normfuse.recognise.rows.rows import all_finite, varying_axes
from normfuse.rewrite import Editor, Exactness, Phase, Transform, Value

_ROOTS = (aten.rsqrt, aten.sqrt, aten.pow)
_LOOKS = Trait.WHOLE | Trait.EXPAND | Trait.SELECT | Trait.COPY | Trait.CAST
_POINTWISE = (
    aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.rsqrt, aten.sqrt, aten.pow, aten.reciprocal, aten.addcmul,
    aten.clamp, aten.clamp_min,
)  # fmt: skip
_MAX_PROGRAM = 24
_CLOSE = 1e-9
"""Slope and shift are differences of the region's values at two inputs, which costs a few of float64's sixteen digits;
statistics are drawn over nine decades, so that another formula is off by far more at one of them."""


@dataclass(frozen=True)
class Frozen:
    """Places of the tensors among the leaves of a region, and eps; `channel` is an axis of the source."""

    mean: int
    var: int
    gain: int | None
    shift: int | None
    eps: float
    channel: int


@dataclass
class Place:
    """A region with the stored tensors that its sides are computed from."""

    region: Region
    root: fx.Node
    leaves: list[fx.Node]
    programs: list[fx.Node]
    sides: list[fx.Node]


def run(program: Program, facts: Facts, edit: Editor) -> None:
    roles = Roles(program)
    concrete = Concrete(program, roles)
    known: dict[Any, Frozen | None] = {}
    for node in list(program.graph.nodes):
        if node._erased or not _is_seed(node, roles):
            continue
        for place in _places(node, roles):
            key = _key(place, concrete)
            if key not in known:
                known[key] = _identify(place, concrete)
            found = known[key]
            if found is not None and edit.permit(place.root):
                _replace(place, found, edit)
                break


def _is_seed(node: fx.Node, roles: Roles) -> bool:
    """An activation scaled by something with the root of a stored tensor in it."""
    if not is_op(node, aten.mul, aten.div, aten.addcmul) or roles(node) is not Role.ACTIVATION:
        return False
    stored = [n for n in node.all_input_nodes if roles(n) in (Role.FIXED, Role.WEIGHT)]
    return any(_has_root(n, roles) for n in stored)


def _has_root(node: fx.Node, roles: Roles) -> bool:
    return any(is_op(n, *_ROOTS) for n in _program([node], roles) or [])


def _program(sides: list[fx.Node], roles: Roles) -> list[fx.Node] | None:
    """The stored nodes behind some sides in order, if they are few and all of them act on each entry alone."""
    found: list[fx.Node] = []
    for node in walk(sides, lambda n: [] if roles(n) is Role.SIZE else n.all_input_nodes):
        if roles(node) is Role.SIZE:
            continue
        pointwise = node.op == "get_attr" or is_a(node, _LOOKS) or is_op(node, *_POINTWISE)
        if roles(node) is Role.ACTIVATION or not pointwise or len(found) > _MAX_PROGRAM:
            return None
        found.append(node)
    return sorted(found)


def _places(seed: fx.Node, roles: Roles) -> list[Place]:
    """Regions round the seed, the largest roots first; of equal ones the nearest source."""
    found: list[tuple[tuple[int, ...], Place]] = []
    for distance, source in enumerate(sources_of(seed, roles)):
        region = region_from(source, roles, lambda n: n.name, bound=16)
        for root in region.nodes:
            inside = region.inside(root)
            fits = isinstance(value(root), Tensor) and str(shape(root)) == str(shape(source))
            if seed not in inside or not fits or not all(is_op(n, *_POINTWISE) for n in inside):
                continue
            sides = [n for n in region.sides if any(n in i.all_input_nodes for i in inside)]
            programs = _program(sides, roles)
            if programs is None:
                continue
            stored = [n for n in programs if n.op == "get_attr"]
            leaves = [n for n in stored if math.prod(_static(n)) > 1]
            if any(n not in leaves and roles(n) is Role.WEIGHT for n in stored):
                continue  # a learned eps or scale is no constant
            if 2 <= len(leaves) <= 4 and len({math.prod(_static(n)) for n in leaves}) == 1:
                narrow = value(root).dtype == value(source).dtype
                merit = (len(leaves), int(narrow), -distance, -len(inside))
                found.append((merit, Place(region, root, leaves, programs, sides)))
    return [place for _, place in sorted(found, key=lambda f: f[0], reverse=True)]


def _static(node: fx.Node) -> list[int]:
    return [int(s) for s in shape(node)]


def _key(place: Place, concrete: Concrete) -> Any:
    """Places that are spelt alike, whatever the stored vectors hold; a stored number is part of the spelling."""
    names: dict[fx.Node, str] = {place.region.source: "s"}
    inside = place.region.inside(place.root)
    spelt: list[Any] = [str(shape(place.region.source))]
    for node in [*place.programs, *(n for n in place.region.nodes if n in inside)]:
        names[node] = f"n{len(names)}"
        what = str(shape(node)) if node.op == "get_attr" else str(node.target)
        if node.op == "get_attr" and node not in place.leaves:
            what = f"{what} {concrete.describe(node)}"
        args = pytree.tree_map(lambda a: names.get(a, str(value(a))) if isinstance(a, fx.Node) else repr(a), node.args)
        spelt.append((what, repr(args), repr(dict(node.kwargs)) if node.op != "get_attr" else ""))
    return tuple(spelt)


# -- evaluation ---------------------------------------------------------------------------------------------------


def _identify(place: Place, concrete: Concrete) -> Frozen | None:
    try:
        experiment = Experiment(place.region, concrete, 7)
        evaluate = _evaluator(place, experiment)
        drawn = _draw(place, experiment.generator)
        zero, one, some = (torch.full(experiment.shape, v, dtype=torch.float64) for v in (0.0, 1.0, 0.37))
        shift = evaluate(zero, drawn)
        scale = evaluate(one, drawn) - shift
        third = evaluate(some, drawn)
    except (Impossible, KeyError, RuntimeError):
        return None
    bend = (third - 0.37 * scale - shift).abs().amax()
    if not all_finite(shift, scale) or float(bend) > _CLOSE * float(third.abs().amax()):
        return None
    axes = set(varying_axes(scale) or ()) | set(varying_axes(shift) or ())
    if len(axes) != 1:
        return None
    channel = axes.pop()
    return _assign(place, drawn, _along(scale, channel), _along(shift, channel), channel)


def _along(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, -1).flatten(0, -2)[0] if values.dim() > 1 else values


def _draw(place: Place, generator: torch.Generator) -> list[Tensor]:
    """Positive, some of them so small that eps shows."""
    drawn: list[Tensor] = []
    for leaf in place.leaves:
        exponents = -9 * torch.rand(_static(leaf), generator=generator, dtype=torch.float64)
        drawn.append(10**exponents)
    return drawn


def _evaluator(place: Place, experiment: Experiment) -> Callable[[Tensor, list[Tensor]], Tensor]:
    concrete = experiment.concrete

    def evaluate(x: Tensor, drawn: list[Tensor]) -> Tensor:
        values: dict[fx.Node, Any] = dict(zip(place.leaves, drawn, strict=True))
        with torch.no_grad():
            for node in place.programs:
                if node in values:
                    continue
                if node.op == "get_attr":
                    values[node] = concrete.fixed(node)
                    continue
                args, kwargs = fx.map_arg(
                    (node.args, dict(node.kwargs)), lambda n: values[n] if n in values else concrete.fixed(n)
                )
                args, kwargs = pytree.tree_map(promote, (args, kwargs))
                values[node] = in_float64(node.target, args, kwargs)
        sides = {n: values[n] for n in place.sides if n in values}
        return experiment.run(x, sides)[place.root]  # type: ignore[no-any-return]

    return evaluate


def _assign(place: Place, drawn: list[Tensor], scale: Tensor, shift: Tensor, channel: int) -> Frozen | None:
    flat = [d.flatten() for d in drawn]
    others: list[int | None] = [*range(len(flat))]
    for var, mean in itertools.permutations(range(len(flat)), 2):
        rest = [*(i for i in others if i not in (var, mean)), None, None][:2]
        for gain, added in {(rest[0], rest[1]), (rest[1], rest[0])}:
            eps = _eps(flat[var], scale if gain is None else scale / flat[gain])
            if eps is None:
                continue
            wanted = -flat[mean] * scale
            wanted = wanted if added is None else wanted + flat[added]
            if float((wanted - shift).abs().amax()) <= _CLOSE * float(shift.abs().amax()):
                return Frozen(mean, var, gain, added, eps, channel)
    return None


def _eps(var: Tensor, inverse: Tensor) -> float | None:
    """inverse == 1 / sqrt(var + eps) for one eps, found where var is smallest."""
    if bool((inverse <= 0).any()):
        return None
    eps = float((inverse.square().reciprocal() - var)[int(var.argmin())])
    if eps < 0:
        return None
    wanted = torch.rsqrt(var + eps)
    return snapped(eps) if float(((wanted - inverse) / inverse).abs().amax()) < _CLOSE else None


# -- emission -----------------------------------------------------------------------------------------------------


def _replace(place: Place, found: Frozen, edit: Editor) -> None:
    root, source = place.root, place.region.source
    with edit.at(root):
        x = edit.value(source)
        wanted = value(root).dtype
        if torch.finfo(wanted).bits > torch.finfo(value(source).dtype).bits:
            x = x.to(wanted)
        places = (found.mean, found.var, found.gain, found.shift)
        mean, var, gain, shift = (None if i is None else _vector(place.leaves[i], x, edit) for i in places)
        moved = found.channel != 1 or rank(source) < 2
        if moved:
            x = moved_axis(x, found.channel, 1, edit)
        y = edit.call(aten.batch_norm.default, x, gain, shift, mean, var, False, 0.0, found.eps, False)
        if moved:
            y = moved_axis(y, 1, found.channel, edit)
        y = y.to(wanted)
    edit.fired(root, before="batch_norm written out", after="batch_norm")
    edit.replace(root, y)


def _vector(leaf: fx.Node, x: Value, edit: Editor) -> Value:
    v = edit.value(leaf)
    return (v if rank(leaf) == 1 else v.reshape(-1)).to(value(x.node).dtype)


RULE = Transform("raise_frozen_batch_norm", exactness=Exactness.ALGEBRAIC, phase=Phase.RAISE, run=run)
