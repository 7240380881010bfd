"""What looks like a known function and is none, and which condition it fails: for people who ask, not for the passes.

A result that recognition has refused is compared with the same function spelt wrong in the ways that occur: other axes
for the mean, the variance about another mean, absolute values, a number beside the sum of a softmax. It is the same
evaluation as the probe's, at large rows, where no eps is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.evaluate.sizes import Concrete, Impossible
from normfuse.graph.node import argument, aten, is_op, rank, readers, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Role, Roles, weight_only
from normfuse.ops.standardize import STANDARDIZE
from normfuse.recognise.attention.labels import is_look, product_of
from normfuse.recognise.rows.choose import plan_of
from normfuse.recognise.rows.experiment import Experiment, numel
from normfuse.recognise.rows.probe import is_canonical, is_seed
from normfuse.recognise.rows.regions import Region, region_from, sources_of
from normfuse.recognise.rows.rows import all_finite, changed_rows
from normfuse.recognise.rows.standardize import UNSTEADY, Standardisation, Standardised

_MOST_ELEMENTS = 1 << 16
_MOST_ROOTS = 24
_SCORES = (aten.sigmoid, aten.relu, aten.tanh, aten.exp, aten.gelu, aten.silu, aten.elu, aten.softplus)


@dataclass(frozen=True)
class Nearly:
    """`node` looks like a `like`, but `reason`."""

    node: fx.Node
    like: str
    reason: str


def near_misses(program: Program) -> Iterator[Nearly]:
    """The near misses of a raised program in graph order."""
    roles, weights = Roles(program), weight_only(program)
    concretes = (Concrete(program, roles), Concrete(program, roles, small=False))
    explained: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node in weights or node in explained:
            continue
        found = _said_exactly(node) or _other_weights(node, roles)
        if found is None and is_seed(node, roles) and not is_canonical(node):
            found = _in_regions(node, roles, concretes, explained)
        if found is not None and found.node not in explained:
            explained.add(found.node)
            yield found


# -- what has an operator of ours, or none for a plain reason -----------------------------------------------------


def _said_exactly(node: fx.Node) -> Nearly | None:
    """A norm that torch's operators cannot say: passes that want theirs leave it alone."""
    if not is_op(node, STANDARDIZE):
        return None
    like = "layer_norm" if argument(node, "centre") else "rms_norm"
    reasons: list[str] = []
    if argument(node, "ddof"):
        reasons.append("the variance is unbiased (correction=1)")
    place = argument(node, "place")
    if place != "inside":
        how = {"outside": "is added outside of the root", "clamp": "is the floor of the root"}
        reasons.append(f"eps {how.get(place, 'is the floor of the mean square')}")
    return Nearly(node, like, " and ".join(reasons)) if reasons else None


def _other_weights(node: fx.Node, roles: Roles) -> Nearly | None:
    """softmax's place between two products, taken by something else."""
    if not is_op(node, *_SCORES) or roles(node) is not Role.ACTIVATION or rank(node) < 2:
        return None
    name = str(node.target).split(".")[1]

    def behind(n: fx.Node) -> list[fx.Node]:
        return [i for i in n.all_input_nodes if roles(i) is Role.ACTIVATION]

    if _reaches_product(node, lambda n: list(readers(n))) and _reaches_product(node, behind):
        return Nearly(node, "attention", f"{name} stands where the softmax would")
    return None


def _reaches_product(node: fx.Node, step: Callable[[fx.Node], list[fx.Node]]) -> bool:
    """Through views, scales and biases, along the only way there is."""
    for _ in range(8):
        following = [n for n in step(node) if isinstance(value(n), Tensor) and rank(n) >= 2]
        if len(following) != 1:
            return False
        node = following[0]
        if is_op(node, aten.matmul, aten.bmm, aten.einsum):
            return product_of(node) is not None and all(rank(n) > 2 for n in node.all_input_nodes)
        if not is_look(node) and not is_op(node, aten.mul, aten.div, aten.add, aten.sub, aten.masked_fill):
            return False
    return False


# -- by evaluation ------------------------------------------------------------------------------------------------


def _in_regions(
    seed: fx.Node, roles: Roles, concretes: tuple[Concrete, Concrete], explained: set[fx.Node]
) -> Nearly | None:
    """The smallest result that the seed flows into and that has a diagnosis; all that it holds is explained by it."""
    for source in reversed(sources_of(seed, roles)):
        region = region_from(source, roles, concretes[0].describe)
        draws = _draws(region, concretes)
        if draws is None:
            continue
        roots = [n for n in region.nodes if _same_shape(n, source) and seed in region.inside(n)]
        for root in roots[:_MOST_ROOTS]:
            found = _Diagnosis(draws, root).find()
            if found is not None:
                explained.update(region.inside(root))
                explained.discard(root)
                return Nearly(root, *found)
    return None


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    v = value(node)
    return isinstance(v, Tensor) and v.is_floating_point() and str(shape(node)) == str(shape(source))


def _draws(region: Region, concretes: tuple[Concrete, Concrete]) -> Standardisation | None:
    for concrete in concretes:
        try:
            if 4 <= numel(concrete.shape(region.source)) <= _MOST_ELEMENTS:
                draws = Standardisation(Experiment(region, concrete, 5))
                if all(n in draws.large_values[0] for n in region.nodes):
                    return draws
        except (Impossible, RuntimeError):
            continue
    return None


class _Diagnosis:
    """One result of a region against the near misses."""

    def __init__(self, draws: Standardisation, root: fx.Node) -> None:
        self.draws = draws
        self.root = root
        self.values = [v.get(root) for v in draws.large_values]
        self.moderate = [v.get(root) for v in draws.moderate_values]

    def find(self) -> tuple[str, str] | None:
        """(what it looks like, what differs)"""
        if any(not isinstance(v, Tensor) for v in (*self.values, *self.moderate)):
            return None
        if all_finite(*self.values):  # type: ignore[arg-type]
            found = self._member() or self._with_other_axes() or self._with_another_root()
            if found is not None:
                return found
        return self._nearly_softmax()

    def _member(self) -> tuple[str, str] | None:
        """Of the family but for its eps, its gain, or where it stands."""
        experiment = self.draws.experiment
        base = experiment.draw(0.3)
        before = experiment.run(base).get(self.root)
        changed = base.clone()
        changed.view(-1)[base.numel() // 3] += 0.7
        after = experiment.run(changed).get(self.root)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != base.shape:
            return None
        rows = changed_rows(before, after, base.numel() // 3)
        if rows is None or rows.size == 1:
            return None
        found = self.draws.identify(self.root, rows)
        if isinstance(found, Standardised):
            like = "layer_norm" if found.form == "centred" else "rms_norm"
            plan = plan_of(found, experiment.region, self.root)
            return (like, plan) if isinstance(plan, str) else None
        told = {
            "the gain is not one of the weights", "the shift is not one of the weights", "eps differs from row to row",
            "eps stands neither inside nor outside the root, nor as its floor", "its root is negative",
            "it differs on rows of ordinary size", "its root is not that of the row", UNSTEADY,
        }  # fmt: skip
        return ("norm", found) if found in told else None

    def _fits(self, core: Callable[[Tensor], Tensor]) -> bool:
        """Are the results gain * core + shift, element by element?"""
        cores = torch.stack([core(x) for x in self.draws.large])
        y = torch.stack(self.values)  # type: ignore[arg-type]
        if not all_finite(cores) or float(y.abs().amax()) == 0:
            return False
        centre, middle = cores.mean(0), y.mean(0)
        gain = ((cores - centre) * (y - middle)).sum(0) / (cores - centre).square().sum(0)
        off = (y - gain * cores - (middle - gain * centre)).abs().amax()
        return all_finite(gain) and float(gain.abs().amin()) > 1e-9 and float(off) <= 1e-7 * float(y.abs().amax())

    def _axes(self) -> list[tuple[int, ...]]:
        sizes = self.draws.experiment.shape
        wide = [a for a, s in enumerate(sizes) if s > 1][-4:]
        return [c for n in range(1, len(wide) + 1) for c in itertools.combinations(wide, n)]

    def _with_other_axes(self) -> tuple[str, str] | None:
        for spread, mean in itertools.product(self._axes(), repeat=2):
            if mean != spread and (
                self._fits(lambda x, m=mean, s=spread: _over(_centred(x, m), _centred(x, s), s))
                or self._fits(lambda x, m=mean, s=spread: _over(_centred(x, m), _centred(x, m), s))
            ):
                mine, theirs = self._told(mean), self._told(spread)
                return "layer_norm", f"the mean is taken over {mine} and the variance over {theirs}"
        return None

    def _with_another_root(self) -> tuple[str, str] | None:
        for axes in self._axes():
            for like, reason, core in _ROOTS:
                if self._fits(lambda x, a=axes, c=core: c(x, a)):
                    return like, reason
        return None

    def _told(self, axes: tuple[int, ...]) -> str:
        ndim = len(self.draws.experiment.shape)
        names = ", ".join(str(a - ndim) for a in axes)
        return f"axis {names}" if len(axes) == 1 else f"axes {names}"

    def _nearly_softmax(self) -> tuple[str, str] | None:
        """y = exp(x) * k, with one k for each row."""
        x, y = self.draws.moderate[0], self.moderate[0]
        if not isinstance(y, Tensor) or y.shape != x.shape or not all_finite(y) or not bool((y > 0).all()):
            return None
        other = self.draws.among_others(self.root, x, 0)
        steady = other is not None and torch.allclose(other, y, rtol=1e-9, atol=0)
        ratios = y / x.exp()
        for axis in range(x.dim()):
            k = ratios.narrow(axis, 0, 1)
            if x.shape[axis] < 2 or float((ratios - k).abs().amax()) > 1e-9 * float(ratios.abs().amax()):
                continue
            totals = x.exp().sum(axis, keepdim=True)
            beside, times = 1 / k - totals, k * totals
            if _is_one_number(beside):
                number = f"{float(beside.flatten()[0]):g}" if steady else "a number of the model"
                return "softmax", f"{number} is added to the sum below"
            if _is_one_number(times) and abs(float(times.flatten()[0]) - 1) > 1e-9:
                number = f"{float(times.flatten()[0]):g}" if steady else "a number of the model"
                return "softmax", f"it is multiplied by {number} afterwards"
        return None


def _is_one_number(values: Tensor) -> bool:
    first = values.flatten()[0]
    return float(first.abs()) > 1e-6 and float((values - first).abs().amax()) <= 1e-8 * float(first.abs())


def _centred(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x - x.mean(axes, keepdim=True)


def _over(above: Tensor, below: Tensor, axes: tuple[int, ...]) -> Tensor:
    return above / below.square().mean(axes, keepdim=True).sqrt()


_ROOTS: tuple[tuple[str, str, Callable[[Tensor, tuple[int, ...]], Tensor]], ...] = (
    ("rms_norm", "it is divided by the standard deviation, which is taken about a mean that is not subtracted",
     lambda x, a: _over(x, _centred(x, a), a)),
    ("layer_norm", "it is divided by the root of the mean square of what was not centred",
     lambda x, a: _over(_centred(x, a), x, a)),
    ("layer_norm", "it is divided by the mean of absolute values, not by the root of the mean square",
     lambda x, a: _centred(x, a) / _centred(x, a).abs().mean(a, keepdim=True)),
    ("rms_norm", "it is divided by the mean of absolute values, not by the root of the mean square",
     lambda x, a: x / x.abs().mean(a, keepdim=True)),
    ("l2_norm", "it is divided by the largest absolute value, not by the length",
     lambda x, a: x / x.abs().amax(a, keepdim=True)),
    ("layer_norm", "it is divided by the variance, not by its root",
     lambda x, a: _centred(x, a) / _centred(x, a).square().mean(a, keepdim=True)),
    ("rms_norm", "it is divided by the mean square, not by its root",
     lambda x, a: x / x.square().mean(a, keepdim=True)),
)  # fmt: skip

__all__ = ["Nearly", "near_misses"]
