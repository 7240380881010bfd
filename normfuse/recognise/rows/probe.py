"""The probe: every result of a region is evaluated against the family of known functions.

It decides what a region computes, whatever operators it is made of. Equal regions (the twelve norms of twelve layers)
are evaluated once. Draws are seeded, so that a verdict is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.evaluate.sizes import Concrete, Excerpt, Impossible
from normfuse.graph.node import argument, aten, is_op, same_size, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Role, Roles, value_operands
from normfuse.ops import operator_of
from normfuse.ops.traits import Trait, is_a
from normfuse.recognise.rows.by_reference import Known, identify_by_reference
from normfuse.recognise.rows.experiment import Experiment, numel
from normfuse.recognise.rows.family import (
    Activation,
    Softmax,
    Squashed,
    identify_logsumexp,
    identify_pointwise,
    identify_softmax,
)
from normfuse.recognise.rows.regions import Region, region_from
from normfuse.recognise.rows.rows import Rows, changed_rows
from normfuse.recognise.rows.standardize import Standardisation, Standardised

Finding = Standardised | Softmax | Activation | Squashed | Known

MAX_ELEMENTS = 1 << 22
SEED = 20_240_611

_STATISTICS = Trait.REDUCTION | Trait.MEAN_POOL | Trait.ROW_NORM | Trait.GROUP_NORM
_FUNCTIONS = (aten.logsumexp, aten.gelu, aten.silu)
_BENDS = (
    aten.tanh, aten.erf, aten.erfc, aten.special_erf, aten.special_erfc, aten.sigmoid, aten.special_expit, aten.exp,
    aten.special_ndtr, aten.exp2, aten.expm1, aten.hardtanh, aten.log_sigmoid, aten.special_exp2,
)  # fmt: skip
_UNTAGGED = (aten.pad, aten.constant_pad_nd, aten.hardswish, aten.rsub, aten.to, aten._to_copy)
"""Entry by entry, though torch does not say so; what is put around a tensor leaves its entries as they are."""


def is_canonical(node: fx.Node) -> bool:
    """Does the operator itself say what is computed?"""
    if is_op(node, *_FUNCTIONS):
        return True
    record = operator_of(node.target)
    if record is None or not record.canonical or record.fixed or not is_op(node, record.packet):
        return False
    return record.role in ("norm", "softmax", "squash")


def is_seed(node: fx.Node, roles: Roles) -> bool:
    """Does something that the family is made of happen here?"""
    if is_a(node, _STATISTICS) or is_op(node, *_BENDS, aten.log_softmax) or _is_norm_of_ours(node):
        return roles(node) is Role.ACTIVATION
    if is_op(node, aten.batch_norm):
        return bool(argument(node, "training")) and roles(node) is Role.ACTIVATION
    if is_a(node, Trait.LINEAR | Trait.CONVOLUTION | Trait.PRODUCT) or is_op(node, aten.einsum):
        active = [n for n in value_operands(node) if roles(n) is Role.ACTIVATION]
        fixed = [n for n in value_operands(node) if roles(n) is Role.FIXED]
        return bool(active) and (bool(fixed) or len(active) > 1 or is_op(node, aten.einsum))
    return False


def is_pointwise(node: fx.Node) -> bool:
    """Does each entry of the result depend on that entry of the operands alone, broadcast, whatever their sizes?"""
    if is_op(node, aten.batch_norm):
        return not argument(node, "training")
    if is_op(node, *_UNTAGGED):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_norm_of_ours(node: fx.Node) -> bool:
    record = operator_of(node.target)
    return record is not None and record.ours and record.role == "norm"


@dataclass
class Verdict:
    """What the probe found in one region: the root by its place in the region, and what it is; or why not.

    `again` is the verdict at other sizes, where sizes that may vary are part of what is computed.
    """

    findings: dict[int, Finding] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    again: Verdict | None = None


class Probe:
    """`look(source)`: the region of the source and everything known that is computed in it."""

    def __init__(self, program: Program, roles: Roles) -> None:
        self.roles = roles
        self.concrete = Concrete(program, roles)
        self.sizes = (
            self.concrete,
            Concrete(program, roles, variant=1),
            Concrete(program, roles, small=False),
            Concrete(program, roles, small=False, variant=1),
        )
        self.excerpts = (Excerpt(program, roles), Excerpt(program, roles, small=False))
        self.known: dict[Any, Verdict] = {}
        self.runs = 0

    def look(self, source: fx.Node) -> tuple[Region, Verdict]:
        region = region_from(source, self.roles, self.concrete.describe)
        if region.key not in self.known:
            self.known[region.key] = self._evaluate(region)
        return region, self.known[region.key]

    def _evaluate(self, region: Region) -> Verdict:
        verdict: Verdict | None = None
        for concrete in self.excerpts if all(map(is_pointwise, region.nodes)) else self.sizes:
            try:
                if not 4 <= numel(concrete.shape(region.source)) <= MAX_ELEMENTS:
                    continue
                found = self._with(region, Experiment(region, concrete, SEED))
            except Impossible:
                continue
            if verdict is not None:
                verdict.again = found
                break
            verdict = found
            if not _depends_on_sizes(region, found):
                break
        return verdict or Verdict()

    def _with(self, region: Region, experiment: Experiment) -> Verdict:
        roots = self._roots(region)
        if not roots:
            return Verdict()
        draws = Standardisation(experiment)
        if any(n not in draws.moderate_values[0] for n in region.nodes):
            raise Impossible("an operator fails at these sizes")
        changes = _changes(experiment)
        if not any(self._finite(draws, root, changes) for root in roots):
            experiment.positive_sides()
            draws, changes = Standardisation(experiment), _changes(experiment)
        verdict = Verdict()
        for root in roots:
            found = self._identify(draws, root, changes)
            place = region.index[root]
            if isinstance(found, str):
                verdict.reasons[place] = found
            elif found is not None:
                verdict.findings[place] = found
        self.runs += experiment.runs
        return verdict

    def _roots(self, region: Region) -> list[fx.Node]:
        """Results of the source's shape (or, for log-sum-exp, of less) that a seed flows into."""
        fed: set[fx.Node] = set()
        roots: list[fx.Node] = []
        for node in region.nodes:
            if is_seed(node, self.roles) or any(n in fed for n in node.all_input_nodes):
                fed.add(node)
                val = value(node)
                if is_canonical(node):
                    continue  # it is known what this is; what is made of it is not
                if isinstance(val, Tensor) and val.is_floating_point() and _fits(region.source, node):
                    roots.append(node)
        return roots

    def _finite(self, draws: Standardisation, root: fx.Node, changes: _Changes) -> bool:
        """Has the result numbers, also (where it is more than pointwise) on large rows?"""

        def finite(values: Any) -> bool:
            return isinstance(v := values.get(root), Tensor) and bool(torch.isfinite(v).all())

        if not finite(draws.moderate_values[0]):
            return False
        rows = changes.rows(root) if changes.is_of_the_shape(root) else None
        return (rows is not None and rows.size == 1) or all(finite(values) for values in draws.large_values)

    def _identify(self, draws: Standardisation, root: fx.Node, changes: _Changes) -> Finding | str | None:
        if not isinstance(changes.before.get(root), Tensor):
            return None
        if not changes.is_of_the_shape(root):
            return identify_logsumexp(draws, root)
        if not all(isinstance(values.get(root), Tensor) for _, values in changes.after):
            return None
        rows = changes.rows(root)
        if rows is None:
            return "its elements do not depend on the source row by row"
        if rows.size == 1:
            return identify_pointwise(draws, root)
        softmax = identify_softmax(draws, root, rows)
        if softmax is not None:
            return softmax
        found = draws.identify(root, rows)
        return (identify_by_reference(draws, root, rows) or found) if isinstance(found, str) else found


def _depends_on_sizes(region: Region, verdict: Verdict) -> bool:
    """May what was found be an accident of the sizes at which it was found?"""
    if not verdict.findings:
        return False
    if any(isinstance(value(n), torch.SymInt | torch.SymFloat) for n in region.sides):
        return True
    sizes = shape(region.source)
    found = [f for f in verdict.findings.values() if isinstance(f, Standardised | Softmax | Known)]
    rows = [f.rows for f in found if f.rows is not None]
    axes = {a for r in rows for a in (*r.axes, *((r.split,) if r.split is not None else ()))}
    return any(not isinstance(sizes[a], int) for a in axes)


@dataclass
class _Changes:
    """What a change of one element of the source changes, tried at two places."""

    shape: tuple[int, ...]
    before: dict[fx.Node, Any]
    after: list[tuple[int, dict[fx.Node, Any]]]
    known: dict[fx.Node, Rows | None] = field(default_factory=dict)

    def is_of_the_shape(self, root: fx.Node) -> bool:
        base = self.before.get(root)
        return isinstance(base, Tensor) and tuple(base.shape) == self.shape

    def rows(self, root: fx.Node) -> Rows | None:
        """The rows that the result is made of, alike at both places, or None."""
        if root not in self.known:
            changed = [(place, values.get(root)) for place, values in self.after]
            found = {
                changed_rows(self.before[root], now, place) if isinstance(now, Tensor) else None for place, now in changed
            }
            self.known[root] = found.pop() if len(found) == 1 else None
        return self.known[root]


def _changes(experiment: Experiment) -> _Changes:
    base = experiment.draw(0.3)
    positions = [base.numel() // 3, 2 * base.numel() // 3 + 1]
    after = [(place, experiment.run(_changed(base, place))) for place in positions]
    return _Changes(experiment.shape, experiment.run(base), after)


def _changed(x: Tensor, position: int) -> Tensor:
    flat = x.clone().flatten()
    flat[position] += 0.7
    return flat.view(x.shape)


def _fits(source: fx.Node, node: fx.Node) -> bool:
    mine, theirs = shape(source), shape(node)
    if len(mine) == len(theirs):
        different = [not (same_size(a, b) or _known_equal(a, b)) for a, b in zip(mine, theirs, strict=True)]
        return not any(different) or (sum(different) == 1 and is_op(node, aten.add, aten.log, aten.logsumexp))
    return len(theirs) == len(mine) - 1 and is_op(node, aten.add, aten.log, aten.select, aten.reshape)


def _known_equal(a: Any, b: Any) -> bool:
    """Equal by what the exporter found out about the sizes."""
    return isinstance(a, torch.SymInt | int) and statically_known_true(a == b)
