"""The backward region of a region, by differentiating its graph step by step.

Forward values are computed again from the inputs: on a GPU that costs less than to load them. Adjoints are kept wide,
the roundings of the forward pass have derivative one, and a sum over columns is taken apart where a factor does not
depend on the column, so that as many sums as possible start in the first sweep over a long row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from normfuse.errors import LoweringError
from normfuse.lower.triton.region import COLUMNS, REDUCTIONS, Argument, Extent, Region, centred_on, emit_step, extent, kind

Terms = Iterable[tuple[Any, fx.Node]]


def differentiate(region: Region, wanted: Sequence[bool]) -> Region:
    """The region from the inputs and a gradient per output (`dy...`) to a gradient for each input that is wanted.

    Raises:
        LoweringError: a step without a derivative, or an input that no output depends on.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(region.graph, copies)
    inputs = [copies[node] for node in region.inputs]
    adjoints = _Adjoints(graph, region.wide)
    for output, result in zip(region.outputs, region.results, strict=True):
        adjoints.seed(copies[output], result)
    adjoints.sweep()
    asked = [node for node, wants in zip(inputs, wanted, strict=True) if wants]
    graph.output(tuple(adjoints.of_input(node, region.name) for node in asked))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    results = tuple(Argument(f"d_{node.name}", _leaving(node, region.wide)) for node in asked)
    return Region(f"{region.name}_backward", graph, results)


def _leaving(node: fx.Node, wide: torch.dtype) -> Extent:
    return replace(extent(node), dtype=wide) if node.meta.get("repeated") else extent(node)


class _Adjoints:
    """Reverse mode over the graph: for each value the terms of its adjoint."""

    def __init__(self, graph: fx.Graph, wide: torch.dtype) -> None:
        self.graph, self.wide = graph, wide
        self.forward = list(graph.nodes)
        self.terms: dict[fx.Node, list[fx.Node]] = {}
        self.made: dict[tuple[Any, ...], fx.Node] = {}

    def seed(self, output: fx.Node, result: Argument) -> None:
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            given = self.graph.placeholder(f"d_{result.name}")
        given.meta["extent"] = result.extent
        wide = given if result.extent.dtype == self.wide else self.step("cast", given, dtype=self.wide)
        self.terms.setdefault(output, []).append(wide)

    def sweep(self) -> None:
        for node in reversed(self.forward):
            if node.op != "placeholder" and self.terms.get(node):
                if kind(node) not in _DERIVATIVES:
                    raise LoweringError(f"{kind(node)} has no derivative in a row kernel; use kernel='reference'")
                for argument, term in _DERIVATIVES[kind(node)](self, node, self.total(node)):
                    if isinstance(argument, fx.Node) and extent(argument).dtype.is_floating_point:
                        self.terms.setdefault(argument, []).extend(self.fitted(term, node, argument))

    def of_input(self, node: fx.Node, name: str) -> fx.Node:
        if not self.terms.get(node) or (extent(node).columns and not extent(self.total(node)).columns):
            raise LoweringError(f"{name} has no gradient for {node.name} in a row kernel; use kernel='reference'")
        return self.total(node)

    def total(self, node: fx.Node) -> fx.Node:
        first, *others = self.terms[node]
        for other in others:
            first = self.step("add", first, other)
        self.terms[node] = [first]
        return first

    def step(self, what: str, *args: Any, dtype: torch.dtype | None = None) -> fx.Node:
        """A step, or the one that is already there."""
        key = (what, *args, dtype)
        if key not in self.made:
            self.made[key] = emit_step(self.graph, what, *args, dtype=dtype)
        return self.made[key]

    def fitted(self, term: fx.Node, over: fx.Node, argument: fx.Node) -> list[fx.Node]:
        """Summed over the columns along which `argument` was broadcast. Over rows it is summed as it leaves."""
        if extent(argument).columns or not extent(over).columns or kind(over) in REDUCTIONS:
            return [term]
        return self.summed(term)

    def summed(self, term: fx.Node) -> list[fx.Node]:
        """The sum of a term over its columns, as terms: the sums of adjoints one by one, factors per row outside.

        Deviations from a mean have the sum zero.
        """
        if not extent(term).columns:
            return [self.step("mul", term, COLUMNS)]
        core, scales = self.split(term)
        match kind(core), core.args:
            case "add", (fx.Node() as a, fx.Node() as b) if core not in self.forward:
                totals = [*self.summed(a), *self.summed(b)]
            case _:
                totals = [] if centred_on(core) is not None else [self.step("sum", core)]
        for what, *factor in scales:
            totals = [self.step(what, total, *factor) for total in totals]
        return totals

    def split(self, term: fx.Node) -> tuple[fx.Node, list[tuple[Any, ...]]]:
        """A term as a part with columns and the steps on numbers per row that make it the term."""
        if extent(term).dtype != self.wide:  # a narrow step rounds
            return term, []
        match kind(term), term.args:
            case "neg", (fx.Node() as a,):
                core, scales = self.split(a)
                return core, [*scales, ("neg",)]
            case ("mul" | "div") as what, (fx.Node() as a, b) if not _has_columns(b):
                core, scales = self.split(a)
                return core, [*scales, (what, b)]
            case "mul", (a, fx.Node() as b) if not _has_columns(a):
                core, scales = self.split(b)
                return core, [*scales, ("mul", a)]
            case "mul", (fx.Node() as a, fx.Node() as b):
                (left, first), (right, second) = self.split(a), self.split(b)
                return (self.step("mul", left, right) if first or second else term), [*first, *second]
            case _:
                return term, []

    def compare(self, what: str, a: Any, b: Any) -> fx.Node:
        return self.step(what, a, b, dtype=torch.bool)


def _has_columns(value: Any) -> bool:
    return isinstance(value, fx.Node) and extent(value).columns


Rule = Callable[[_Adjoints, fx.Node, fx.Node], Terms]


def _times(factor: Callable[[_Adjoints, fx.Node, Any], Any]) -> Rule:
    """A function of one value whose derivative is a factor, made of its result and its argument."""
    return lambda to, node, g: [(node.args[0], to.step("mul", g, factor(to, node, node.args[0])))]


def _mul(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    a, b = node.args
    if a is b:
        return [(a, to.step("mul", to.step("mul", g, 2.0), a))]
    return [(a, to.step("mul", g, b)), *([(b, to.step("mul", g, a))] if isinstance(b, fx.Node) else [])]


def _div(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    a, b = node.args
    quotient = to.step("div", g, b)
    return [(a, quotient), *([(b, to.step("neg", to.step("mul", quotient, node)))] if isinstance(b, fx.Node) else [])]


def _sub(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    return [(node.args[0], g), *([(node.args[1], to.step("neg", g))] if isinstance(node.args[1], fx.Node) else [])]


def _larger(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    a, b = node.args
    first = to.compare("ge", a, b)
    return [(a, to.step("where", first, g, 0.0)), (b, to.step("where", first, 0.0, g))]


def _smaller(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    a, b = node.args
    first = to.compare("le", a, b)
    return [(a, to.step("where", first, g, 0.0)), (b, to.step("where", first, 0.0, g))]


def _where(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    condition, a, b = node.args
    for argument, arms in ((a, (g, 0.0)), (b, (0.0, g))):
        if isinstance(argument, fx.Node):
            yield argument, to.step("where", condition, *arms)


def _pow(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    a, p = node.args
    slope = to.step("mul", a, a) if p == 3 else to.step("pow", a, p - 1.0)  # type: ignore[operator]
    return [(a, to.step("mul", to.step("mul", g, p), slope))]


def _threshold(to: _Adjoints, node: fx.Node, g: fx.Node) -> Terms:
    """sum(max(z - t, 0)**p) = 1 gives dt/dz = u / sum(u) with u = max(z - t, 0)**(p - 1)."""
    z, power = node.args
    over = to.step("sub", z, node)
    inside = to.compare("gt", over, 0.0)
    u = to.step("where", inside, to.step("add", to.step("mul", over, 0.0), 1.0) if power == 1 else over, 0.0)
    return [(z, to.step("mul", u, to.step("div", g, to.step("sum", u))))]


def _sigmoid(to: _Adjoints, node: fx.Node, a: Any) -> fx.Node:
    return to.step("mul", node, to.step("sub", 1.0, node))


def _bell(to: _Adjoints, a: Any) -> fx.Node:
    bell = to.step("exp", to.step("neg", to.step("mul", a, a)))
    return to.step("mul", bell, 2.0 / math.sqrt(math.pi))


def _cubed(to: _Adjoints, node: fx.Node, a: Any) -> fx.Node:
    return to.step("mul", to.step("mul", to.step("mul", node, node), node), -0.5)


def _sign(to: _Adjoints, node: fx.Node, a: Any) -> fx.Node:
    above = to.step("where", to.compare("gt", a, 0.0), to.step("add", to.step("mul", a, 0.0), 1.0), 0.0)
    below = to.step("where", to.compare("lt", a, 0.0), to.step("add", to.step("mul", a, 0.0), 1.0), 0.0)
    return to.step("sub", above, below)


_DERIVATIVES: dict[str, Rule] = {
    "add": lambda to, node, g: [(each, g) for each in node.args],
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": lambda to, node, g: [(node.args[0], to.step("neg", g))],
    "cast": lambda to, node, g: [(node.args[0], g)],
    "detach": lambda to, node, g: [],
    "floor": lambda to, node, g: [],
    "where": _where,
    "maximum": _larger,
    "minimum": _smaller,
    "clamp_min": lambda to, node, g: [
        (node.args[0], to.step("where", to.compare("ge", node.args[0], node.args[1]), g, 0.0))
    ],
    "relu": lambda to, node, g: [(node.args[0], to.step("where", to.compare("gt", node.args[0], 0.0), g, 0.0))],
    "exp": _times(lambda to, node, a: node),
    "exp2": _times(lambda to, node, a: to.step("mul", node, math.log(2.0))),
    "log": lambda to, node, g: [(node.args[0], to.step("div", g, node.args[0]))],
    "sqrt": lambda to, node, g: [(node.args[0], to.step("div", to.step("mul", g, 0.5), node))],
    "rsqrt": _times(_cubed),
    "reciprocal": _times(lambda to, node, a: to.step("neg", to.step("mul", node, node))),
    "tanh": _times(lambda to, node, a: to.step("sub", 1.0, to.step("mul", node, node))),
    "erf": _times(lambda to, node, a: _bell(to, a)),
    "sigmoid": _times(_sigmoid),
    "abs": _times(_sign),
    "pow": _pow,
    "sum": lambda to, node, g: [(node.args[0], g)],
    "threshold": _threshold,
}
