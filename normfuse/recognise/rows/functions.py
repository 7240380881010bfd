"""raise_functions: norms, softmax and activations, however they are written  ->  their canonical operators

Exactness: algebraic.
Legal if:  the region computes the function for all values of its source and of whatever else enters it, which the probe
           finds out by evaluating it; the root of the region is replaced, and intermediates that are read elsewhere stay.
Leaves alone: near misses: other statistics, other axes for mean and variance, statistics of the batch.
Reference: METHODS 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import aten, is_op, readers, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Roles, is_view
from normfuse.recognise.rows.choose import Plan, plan_of
from normfuse.recognise.rows.emit import can_emit, emit_norm, emit_pointwise, emit_softmax
from normfuse.recognise.rows.family import Activation, Softmax, Squashed
from normfuse.recognise.rows.probe import Probe, is_canonical, is_seed
from normfuse.recognise.rows.regions import Region, sources_of
from normfuse.recognise.rows.standardize import Standardised
from normfuse.rewrite import Editor, Exactness, Phase, Transform

_MOST_ROOTS = 8
_TIER = {"group_norm": 4, "instance_norm": 4, "layer_norm": 3, "crms_norm": 2, "rms_norm": 2, "l2_norm": 2}


@dataclass(frozen=True)
class Candidate:
    """One reading of a place in the graph: this root is that function of this source."""

    region: Region
    root: fx.Node
    finding: Any
    plan: Plan | None
    distance: int

    @property
    def kind(self) -> str:
        return self.plan.kind if self.plan is not None else self.finding.kind

    @property
    def absorbs(self) -> bool:
        return self.plan is not None and (self.plan.weight is not None or self.plan.bias is not None)

    def merit(self) -> tuple[Any, ...]:
        """What is preferred: a complete affine part, the dtype of the source, the more special kind, the smaller region."""
        narrow = value(self.region.source).dtype == value(self.root).dtype
        bits = torch.finfo(value(self.region.source).dtype).bits
        if self.plan is None:
            scale = getattr(self.finding, "scale", 1.0)
            inside = self.region.inside(self.root)
            return (scale == 1.0, narrow, -bits, sum(not is_view(n) for n in inside), -len(inside))
        plan = self.plan
        absorbed = (plan.weight is not None) + (plan.bias is not None)
        behind = (plan.times is not None) + (plan.plus is not None) + (plan.constant != 1.0)
        negative = any(f is not None and f.scale < 0 for f in (plan.weight, plan.times)) or plan.constant < 0
        size = len(self.region.inside(self.root))
        views = plan.rows.split is not None
        tier = _TIER[plan.kind]
        return (-behind, tier >= 3, absorbed, not negative, narrow, -bits, views, tier, -self.distance, -size)


def run(program: Program, facts: Facts, edit: Editor) -> None:
    roles = Roles(program)
    probe = Probe(program, roles)
    for seed in list(program.graph.nodes):
        for _ in range(_MOST_ROOTS):  # two gains may share one set of statistics
            if seed._erased or not seed.users or not is_seed(seed, roles):
                break
            best = _best(seed, roles, probe)
            if best is None or not edit.permit(best.root):
                break
            _replace(best, edit)


def _best(seed: fx.Node, roles: Roles, probe: Probe) -> Candidate | None:
    found: list[Candidate] = []
    sources = sources_of(seed, roles)
    for distance, source in enumerate(sources):
        region, verdict = probe.look(source)
        for place, finding in verdict.findings.items():
            root = region.nodes[place - 1]
            if seed not in region.inside(root) or not root.users:
                continue
            again = None if verdict.again is None else verdict.again.findings.get(place)
            if verdict.again is not None and again is None:
                continue  # an accident of the sizes
            candidate = _candidate(region, root, finding, again, distance)
            if candidate is not None and not _is_canonical(candidate):
                found.append(candidate)
    whole = [c for c in found if not _leaks(c, found)]
    return max(whole, key=Candidate.merit, default=None)


def _candidate(region: Region, root: fx.Node, finding: Any, again: Any, distance: int) -> Candidate | None:
    if not isinstance(finding, Standardised):
        same = again is None or _alike(finding, again)
        return Candidate(region, root, finding, None, distance) if same else None
    plan = plan_of(finding, region, root)
    if isinstance(plan, str):
        return None
    if again is not None:
        other = plan_of(again, region, root) if isinstance(again, Standardised) else ""
        if isinstance(other, str) or not plan.agrees(other):
            return None
        plan = plan.with_parts_of(other)
    return Candidate(region, root, finding, plan, distance) if can_emit(plan, region) else None


def _alike(one: Any, two: Any) -> bool:
    if type(one) is not type(two) or one.kind != two.kind:
        return False
    if isinstance(one, Softmax):
        mine, theirs = (None if f.rows is None else (f.rows.axes, f.rows.split) for f in (one, two))
        return mine == theirs and one.axis == two.axis and abs(one.scale - two.scale) < 1e-9
    return not isinstance(one, Squashed) or one.alpha.side == two.alpha.side


def _is_canonical(candidate: Candidate) -> bool:
    """The operator itself, or views and casts round it: nothing would be gained."""
    root = candidate.root
    if is_canonical(root):
        return True
    inside = candidate.region.inside(root)
    if isinstance(candidate.finding, Softmax):
        return any(is_op(n, getattr(aten, candidate.kind)) for n in inside)
    operators = [n for n in inside if is_canonical(n)]
    if not operators:
        return False
    given = any(len([i for i in n.all_input_nodes if i not in inside]) > 1 for n in operators)
    return not candidate.absorbs or given


def _leaks(candidate: Candidate, others: list[Candidate]) -> bool:
    """Is a smaller root of the same kind also read outside? Then that one is the norm, and this its reader.

    Unless each reader is a gain or a shift: then there are as many norms of the same statistics.
    """
    inside = candidate.region.inside(candidate.root)
    for other in others:
        if other.root is candidate.root or other.root not in inside or other.kind != candidate.kind:
            continue
        outside = [reader for reader in readers(other.root) if reader not in inside]
        rest = [c.region.inside(c.root) for c in others if c.root is not other.root and c.absorbs]
        if any(not any(reader in nodes for nodes in rest) for reader in outside):
            return True
    return False


def _replace(best: Candidate, edit: Editor) -> None:
    root = best.root
    with edit.at(root):
        if best.plan is not None:
            new = emit_norm(best.plan, best.region, root, edit)
        elif isinstance(best.finding, Softmax):
            new = emit_softmax(best.finding, best.region, root, edit)
        else:
            assert isinstance(best.finding, Activation | Squashed)
            new = emit_pointwise(best.finding, best.region, root, edit)
            if new is None:
                return
    edit.fired(root, before=f"{best.kind} written out", after=best.kind)
    edit.replace(root, new)


RULE = Transform("raise_functions", exactness=Exactness.ALGEBRAIC, phase=Phase.RAISE, run=run)
