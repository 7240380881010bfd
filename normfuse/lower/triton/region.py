"""Row regions: a small fx graph of pointwise steps and row reductions, traced from an operator's reference.

Every value of a region is a matrix in one of four extents: a tensor of rows (rows, columns), a number per row (rows, 1),
a number per column (1, columns), or a scalar (1, 1). The reference in torch, the forward kernel and the backward
region all come from this graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.errors import LoweringError

aten = torch.ops.aten

POINTWISE = frozenset(
    (
        "add", "sub", "mul", "div", "neg", "exp", "exp2", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "erf", "sigmoid",
        "abs", "floor", "maximum", "minimum", "clamp_min", "relu", "where", "gt", "ge", "lt", "le", "eq", "ne", "pow",
        "cast", "detach",
    )
)  # fmt: skip
REDUCTIONS = frozenset(("sum", "amax", "threshold"))
_SPELLED = {"_to_copy": "cast", "alias": "detach", "clamp": "clamp_min"}
_SIZES: dict[Any, str] = {operator.add: "+", operator.sub: "-", operator.mul: "*"}
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Extent:
    """Which of the two axes a value has, and its dtype."""

    rows: bool
    columns: bool
    dtype: torch.dtype

    def meet(self, *others: Extent) -> Extent:
        """The extent of a pointwise step over these."""
        every = (self, *others)
        return replace(self, rows=any(e.rows for e in every), columns=any(e.columns for e in every))


@dataclass(frozen=True)
class Argument:
    """What a reference takes: its name, and the extent in which it comes.

    `repeated`: a smaller tensor says it all. A matrix of fewer rows begins anew where they end, and the gradient leaves
    wide, because it is going to be summed.
    """

    name: str
    extent: Extent
    repeated: bool = False


def rows(name: str, dtype: torch.dtype) -> Argument:
    """A tensor of rows."""
    return Argument(name, Extent(True, True, dtype))


def per_row(name: str, dtype: torch.dtype) -> Argument:
    """One number for each row."""
    return Argument(name, Extent(True, False, dtype))


def per_column(name: str, dtype: torch.dtype) -> Argument:
    """One number for each column."""
    return Argument(name, Extent(False, True, dtype))


def scalar(name: str, dtype: torch.dtype) -> Argument:
    """One number."""
    return Argument(name, Extent(False, False, dtype))


@dataclass(frozen=True)
class Region:
    """A traced reference. Nodes carry `meta["extent"]`; `results` says in which extent and dtype each output leaves.

    An output whose value has rows, but whose result has none, is a sum over the rows: the gradient of a gain.
    """

    name: str
    graph: fx.Graph
    results: tuple[Argument, ...]

    @cached_property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @cached_property
    def outputs(self) -> list[fx.Node]:
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    @cached_property
    def summed(self) -> list[bool]:
        """Which results are sums over the rows."""
        pairs = zip(self.outputs, self.results, strict=True)
        return [extent(node).rows and not result.extent.rows for node, result in pairs]

    @cached_property
    def wide(self) -> torch.dtype:
        """What it is computed in."""
        double = any(node.meta["extent"].dtype == torch.float64 for node in self.inputs)
        return torch.float64 if double else torch.float32

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The region in torch, step by step: what its kernel is held to."""
        known: dict[fx.Node, Any] = dict(zip(self.inputs, tensors, strict=True))
        for node in self.graph.nodes:
            if node.op == "call_function":
                known[node] = run_step(node, known)
        return tuple(_leave(known[node], result.extent) for node, result in zip(self.outputs, self.results, strict=True))


def extent(node: fx.Node) -> Extent:
    return node.meta["extent"]


def repeats(node: fx.Node) -> bool:
    """An input matrix that has fewer rows than there are."""
    return bool(node.meta.get("repeated")) and extent(node).rows and extent(node).columns


def kind(node: fx.Node) -> str:
    """The step's name, `""` for a placeholder: `"add"`, `"sum"`."""
    return "" if node.op == "placeholder" else str(node.meta["kind"])


def trace(
    name: str,
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Argument],
    results: Sequence[str] = ("y",),
) -> Region:
    """The region of a reference over matrices, which reduces the last axis with `keepdim=True`.

    Raises:
        LoweringError: the reference does what a row kernel has no step for.
    """
    examples = [_example(argument.extent) for argument in arguments]
    given = make_fx(lambda *tensors: reference(*tensors), tracing_mode="symbolic")(*examples)
    graph, known = fx.Graph(), dict[fx.Node, Any]()
    names, leaving = iter(arguments), list[fx.Node]()
    for node in given.graph.nodes:
        if node.op == "placeholder":
            argument = next(names)
            known[node] = graph.placeholder(argument.name)
            known[node].meta |= {"extent": argument.extent, "repeated": argument.repeated}
        elif node.op == "output":
            found = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            leaving = [known[each] for each in found]
            graph.output(tuple(leaving))
        else:
            known[node] = _Importer(name, graph, known).step(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    leave = [Argument(label, extent(node)) for label, node in zip(results, leaving, strict=True)]
    return Region(name, graph, tuple(leave))


def emit_step(graph: fx.Graph, what: str, *args: Any, dtype: torch.dtype | None = None) -> fx.Node:
    """A new step at the end of a graph. `dtype` is what it gives, by default what its widest argument has."""
    tensors = [extent(each) for each in args if isinstance(each, fx.Node)]
    found = tensors[0].meet(*tensors[1:])
    for other in tensors[1:]:
        if tensors[0].dtype != torch.bool:
            found = replace(found, dtype=torch.promote_types(found.dtype, other.dtype))
    if what == "where":
        found = replace(found, dtype=next(e.dtype for e in [*tensors[1:], tensors[0]]))
    if what in REDUCTIONS:
        found = replace(found, columns=False)
    node = graph.call_function(_STEPS[what], args)
    node.meta["kind"], node.meta["extent"] = what, found if dtype is None else replace(found, dtype=dtype)
    return node


def run_step(node: fx.Node, known: Mapping[fx.Node, Any]) -> Tensor:
    """One step on tensors; sizes are asked of the first tensor that has columns."""
    width = next(known[each].shape[-1] for each in node.graph.nodes if each.op == "placeholder" and extent(each).columns)
    args = [_value(each, known, width) for each in node.args]
    if kind(node) == "cast":
        return args[0].to(extent(node).dtype)
    return node.target(*args)  # type: ignore[operator]


@dataclass(frozen=True)
class Size:
    """A number made of the count of columns, as an expression in `columns`."""

    text: str

    def of(self, columns: int) -> Any:
        return eval(self.text, {"columns": columns})

    def __str__(self) -> str:
        return self.text


COLUMNS = Size("columns")


def bare(node: Any) -> Any:
    """Behind what only stops gradients."""
    while isinstance(node, fx.Node) and kind(node) == "detach":
        node = node.args[0]
    return node


def centred_on(difference: Any) -> fx.Node | None:
    """sum(v) where the node is v - sum(v) / columns."""
    if kind(difference) != "sub" or not isinstance(difference.args[1], fx.Node):
        return None
    v, mean = (bare(each) for each in difference.args)
    if not isinstance(v, fx.Node) or kind(mean) != "div" or mean.args[1] != COLUMNS or extent(mean).dtype != extent(v).dtype:
        return None
    first = mean.args[0]
    return first if kind(first) == "sum" and bare(first.args[0]) is v else None


def threshold(z: Tensor, power: float) -> Tensor:
    """t with sum(max(z - t, 0)**power) = 1 along the last axis, for power 1 or 2; the largest z of a row is 0.

    The projections of sparsemax and entmax-1.5 without a sort: the sum falls as t grows and 1 lies in [-1, 0], so it is
    halved down to one rounding, and a step of Newton's does the rest.
    """
    low, high = torch.full_like(z[..., :1], -1.0), torch.zeros_like(z[..., :1])
    for _ in range(halvings(z.dtype)):
        middle = 0.5 * (low + high)
        enough = (z - middle).clamp_min(0.0).pow(power).sum(-1, keepdim=True) >= 1.0
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    over = (z - low).clamp_min(0.0)
    slope = (over > 0).sum(-1, keepdim=True).to(z.dtype) if power == 1 else 2.0 * over.sum(-1, keepdim=True)
    return low + (over.pow(power).sum(-1, keepdim=True) - 1.0) / slope


def halvings(dtype: torch.dtype) -> int:
    """How often an interval of length 1 is halved until it is one rounding of its dtype."""
    return 54 if dtype == torch.float64 else 26


_library = torch.library.Library("normfuse_steps", "DEF")
_library.define("threshold(Tensor z, float power) -> Tensor")
_library.impl("threshold", threshold, "CompositeExplicitAutograd")
torch.library.register_fake("normfuse_steps::threshold", lambda z, power: z.new_empty((*z.shape[:-1], 1)), lib=_library)


def _threshold_saved(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.power = inputs[1]


def _threshold_gradient(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    """sum(max(z - t, 0)**p) = 1 gives dt/dz = u / sum(u) with u = max(z - t, 0)**(p - 1)."""
    z, tau = ctx.saved_tensors
    over = z - tau
    u = (over > 0).to(z.dtype) if ctx.power == 1 else over.clamp_min(0.0)
    return g * u / u.sum(-1, keepdim=True), None


torch.library.register_autograd(
    "normfuse_steps::threshold", _threshold_gradient, setup_context=_threshold_saved, lib=_library
)


THRESHOLD = torch.ops.normfuse_steps.threshold


class _Importer:
    """Steps of a trace, in the one spelling that the emitter and the derivatives know."""

    def __init__(self, name: str, graph: fx.Graph, known: Mapping[fx.Node, Any]) -> None:
        self.name, self.graph, self.known = name, graph, known

    def step(self, node: fx.Node) -> Any:
        if node.target in _SIZES:
            return Size(f"({self.arg(node.args[0])} {_SIZES[node.target]} {self.arg(node.args[1])})")
        what = getattr(node.target, "_opname", str(node.target))
        if what == "sym_size":
            return self.size(node)
        if what == "scalar_tensor":
            return node.args[0]
        args = [self.arg(each) for each in node.args]
        if what in ("mean", "sum", "amax"):
            return self.reduction(what, node, args)
        if what == "rsub":
            return self.emit(node, "sub", args[1], args[0])
        if what == "square":
            return self.emit(node, "mul", args[0], args[0])
        if what == "pow" and args[1] == 2:
            return self.emit(node, "mul", args[0], args[0])
        what = _SPELLED.get(what, what)
        if what not in POINTWISE | REDUCTIONS or (node.kwargs and what != "cast") or None in args:
            self.refuse(f"no step for {node.target}")
        return self.emit(node, what, *args)

    def arg(self, given: Any) -> Any:
        return self.known[given] if isinstance(given, fx.Node) else given

    def size(self, node: fx.Node) -> Size:
        source: fx.Node = self.arg(node.args[0])
        if int(node.args[1]) % 2 != 1 or not extent(source).columns:  # type: ignore[arg-type]
            self.refuse("the number of rows must not matter")
        return COLUMNS

    def reduction(self, what: str, node: fx.Node, args: list[Any]) -> fx.Node:
        source, axes, keep = args[0], args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else False
        if axes not in ([-1], [1]) or not keep or not extent(source).columns:
            self.refuse(f"{what} must run over the last axis with keepdim=True")
        if what != "mean":
            return self.emit(node, what, source)
        return self.emit(node, "div", self.emit(node, "sum", source), COLUMNS)

    def emit(self, node: fx.Node, what: str, *args: Any) -> fx.Node:
        made = emit_step(self.graph, what, *args, dtype=node.meta["val"].dtype)
        if made.meta["extent"].dtype == torch.float64 and not any(
            extent(each).dtype == torch.float64 for each in self.graph.nodes if each.op == "placeholder"
        ):
            self.refuse("float64 in the middle of a narrower function")
        return made

    def refuse(self, reason: str) -> None:
        raise LoweringError(f"{self.name} cannot be a row kernel: {reason}; use kernel='reference'")


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _amax(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True)


_STEPS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in POINTWISE if hasattr(torch, name)},
    "sub": operator.sub,
    "cast": Tensor.to,
    "clamp_min": torch.clamp_min,
    "sum": _sum,
    "amax": _amax,
    "threshold": THRESHOLD,
}


def _value(arg: Any, known: Mapping[fx.Node, Any], columns: int) -> Any:
    if isinstance(arg, Size):
        return arg.of(columns)
    return known[arg] if isinstance(arg, fx.Node) else arg


def _leave(value: Tensor, result: Extent) -> Tensor:
    value = value if result.rows or value.shape[0] == 1 else value.sum(0, keepdim=True)
    return value.to(result.dtype)


def _example(given: Extent) -> Tensor:
    """Sizes that no two axes share, so that the trace cannot take one for the other."""
    return torch.zeros(5 if given.rows else 1, 7 if given.columns else 1, dtype=given.dtype)
