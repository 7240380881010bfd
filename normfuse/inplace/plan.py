"""What must change in the user's modules so that they compute a rewritten program.

The program before (`old`) and after (`new`) are walked side by side from the outputs. Where they differ in the weights
that an operator reads, the parameter behind that weight gets the new value; where they differ in a norm that is all its
module does, the module is replaced; anything else is a `Problem` that names the rewrites to blame for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from normfuse.graph.node import (
    argument,
    arguments,
    aten,
    expression,
    is_op,
    module_path,
    op_name,
    readers,
    shape,
    site,
    value,
)
from normfuse.graph.program import Program
from normfuse.graph.roles import is_view, weight_only
from normfuse.inplace.slots import Slots, same_program
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite.editor import anchor_name
from normfuse.rewrite.record import FiringKey

Replaced = Mapping[str, Set[FiringKey]]
NORMS = Trait.ROW_NORM | Trait.STORED_NORM


@dataclass(frozen=True)
class Problem:
    """A difference that no change of the user's modules can express, and the rewrites that made it."""

    site: str
    reason: str
    firings: frozenset[FiringKey]


@dataclass(frozen=True)
class Norm:
    """The module at `path` becomes this norm (`kind` is "rms_norm" or "layer_norm"), or, with None, an identity."""

    kind: str | None
    sizes: tuple[int, ...] = ()
    eps: float = 0.0
    weight: fx.Node | None = None
    bias: fx.Node | None = None

    def same(self, other: Norm) -> bool:
        plain = (self.kind, self.sizes, self.eps) == (other.kind, other.sizes, other.eps)
        return plain and same_program(self.weight, other.weight) and same_program(self.bias, other.bias)


@dataclass
class Plan:
    """New values of parameters by qualified name, module paths that become other norms, and what cannot be done."""

    values: dict[str, fx.Node] = field(default_factory=dict)
    materialized: set[str] = field(default_factory=set)
    """Names among `values` whose reparameterization (a parametrization or an old-style hook) goes away."""
    norms: dict[str, Norm] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def plan_write_back(model: nn.Module, old: Program, new: Program, replaced: Replaced) -> Plan:
    """How `model`, which computes `old`, is made to compute `new`; both must come from the same captured program.

    `replaced`: the rewrites that put something else in the place of a node, by the name that it was captured under.
    """
    return _Planner(model, old, new, replaced).run()


class _Planner:
    def __init__(self, model: nn.Module, old: Program, new: Program, replaced: Replaced) -> None:
        self.model = model
        self.old = old
        self.new = new
        self.replaced_by = replaced
        self.alive = {anchor_name(node) for node in new.graph.nodes}
        self.old_weights = weight_only(old)
        self.new_weights = weight_only(new)
        self.slots = Slots(model, old)
        self.plan = Plan()
        self.inside = _nodes_by_module(old, self.old_weights)
        self.seen: set[tuple[fx.Node, fx.Node]] = set()
        self.kept: set[str] = set()
        self.replaced: dict[str, list[tuple[fx.Node, fx.Node]]] = {}

    def run(self) -> Plan:
        pending: list[tuple[Any, Any, fx.Node, fx.Node]] = [
            (self.old.output.args[0], self.new.output.args[0], self.old.output, self.new.output)
        ]
        while pending:
            old, new, reader, new_reader = pending.pop()
            pending.extend(self._compare(old, new, reader, new_reader))
        for path in self.kept & self.replaced.keys():
            for old, new in self.replaced[path]:
                self._problem(old, f"the module {path} is called more than once, and stays as it is elsewhere", new)
        values, materialized, conflicts = self.slots.resolve()
        self.plan.values, self.plan.materialized = values, materialized
        self.plan.problems += [Problem(name, reason, _firings(*nodes)) for name, reason, nodes in conflicts]
        return self.plan

    def _problem(self, old: Any, reason: str, *new: Any) -> None:
        nodes = [n for n in new if isinstance(n, fx.Node)]
        where = site(old) if isinstance(old, fx.Node) else "the model"
        self.plan.problems.append(Problem(where, reason, _firings(*nodes)))

    def _compare(self, old: Any, new: Any, reader: fx.Node, new_reader: fx.Node) -> Iterator[tuple[Any, Any, Any, Any]]:
        if not isinstance(old, fx.Node) or not isinstance(new, fx.Node):
            yield from self._compare_literals(old, new, reader, new_reader)
            return
        if (old, new) in self.seen and old not in self.old_weights:
            return
        self.seen.add((old, new))
        if old in self.old_weights and new in self.new_weights:
            self._compare_weights(old, new, reader, new_reader)
        elif is_a(old, NORMS) and not self._same_norm(old, new):
            yield from self._norm(old, new)
        elif old.op == new.op and old.target == new.target:
            self.kept |= {module_path(old)} if is_a(old, NORMS) else set()
            yield from self._compare_arguments(old, new)
        else:
            what = f"{op_name(old)} becomes {op_name(new)}, which the module's own code does not do"
            firings = self._made_other(old, new) or _firings(new, new_reader)
            self.plan.problems.append(Problem(site(old), what, firings))

    def _made_other(self, old: fx.Node, new: fx.Node) -> frozenset[FiringKey]:
        """Who put `new` where `old` was: who made it if `old` is still there or became it, else who took `old` away."""
        made = frozenset({new.meta["firing"]} if new.meta.get("firing") else ())
        gone = frozenset(self.replaced_by.get(anchor_name(old), ()))
        return made or gone if anchor_name(old) in self.alive else gone or made

    def _compare_literals(self, old: Any, new: Any, reader: fx.Node, new_reader: fx.Node) -> Iterator[Any]:
        sequences = isinstance(old, list | tuple) and isinstance(new, list | tuple)
        if sequences and len(old) == len(new):
            for a, b in zip(old, new, strict=True):
                yield a, b, reader, new_reader
        elif isinstance(old, fx.Node) or isinstance(new, fx.Node) or expression(old) != expression(new):
            self._problem(reader, f"{op_name(reader)} takes other arguments afterwards", new_reader, new)

    def _compare_arguments(self, old: fx.Node, new: fx.Node) -> Iterator[tuple[Any, Any, Any, Any]]:
        if old.op != "call_function":
            return
        before, after = arguments(old), arguments(new)
        for name in before:
            if name == "bias" and before[name] is None and after[name] in self.new_weights:
                weight, path = before["weight"], module_path(old)
                if not (isinstance(weight, fx.Node) and self.slots.add_bias(weight, path, after[name])):
                    self._problem(old, f"{op_name(old)} needs a bias, which its module has no place for", after[name])
                continue
            yield before[name], after[name], old, new

    # -- weights

    def _compare_weights(self, old: fx.Node, new: fx.Node, reader: fx.Node, new_reader: fx.Node) -> None:
        path = module_path(reader)
        whole, looks = new, [(old, new)]
        while is_view(old) and is_view(new) and _same_call(old, new):
            old, new = old.all_input_nodes[0], new.all_input_nodes[0]
            looks.append((old, new))
        if old.op == "get_attr":
            unchanged = new.op == "get_attr" and new.target == old.target
            if not self.slots.use(old, path, None if unchanged else new):
                resized = shape(new) != shape(old)
                why = "gets another shape, which the code may rely on" if resized else "is a constant of the module's code"
                self._problem(reader, f"{old.target} {why}", new, new_reader)
        elif same_program(old, new) and not any(look.meta.get("bake") for _, look in looks):
            self.slots.keep_leaves(old, path)
        elif not any(self.slots.materialize(*look) for look in reversed(looks)):
            self._problem(reader, "its weight is computed by the module's own code at each call", whole, new_reader)

    # -- norms

    def _same_norm(self, old: fx.Node, new: fx.Node) -> bool:
        """The same operator whose gain and shift, if they changed, are parameters with a place of their own."""
        if not is_op(new, old.target):
            return False
        before, after = arguments(old), arguments(new)
        for name in ("weight", "bias"):
            a, b = before[name], after[name]
            plain = isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.op == "get_attr"
            if not plain and not (a is None and b is None) and not same_program(a, b):
                return False
        return before.get("eps") == after.get("eps")

    def _norm(self, old: fx.Node, new: fx.Node) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Another norm in the place of this one, or none at all."""
        path = module_path(old)
        if (why := self._why_not_replace(old, path)) is not None:
            self._problem(old, why, new)
            return
        self.replaced.setdefault(path, []).append((old, new))
        source: fx.Node = arguments(old)["x" if is_op(old, RMS_NORM) else "input"]
        stays = is_op(new, aten.layer_norm, RMS_NORM) and not is_op(old, aten.batch_norm)
        norm = _described(new) if stays else Norm(None)
        if norm is None or not self.plan.norms.setdefault(path, norm).same(norm):
            self._problem(old, f"the module {path} is called more than once, and becomes two different norms", new)
        elif norm.kind is None:
            yield source, new, old, new
        else:
            yield source, new.args[0], old, new

    def _why_not_replace(self, old: fx.Node, path: str) -> str | None:
        if not path or any(not is_a(n, NORMS) for n in self.inside.get(path, ())):
            return f"the norm is written out in the code of {path or 'the model'}, not a module of its own"
        module = self.model.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"the module {path} has hooks, which a new module would lose"
        return None


def _described(new: fx.Node) -> Norm | None:
    axes = argument(new, "axes") if is_op(new, RMS_NORM) else list(range(-len(argument(new, "normalized_shape")), 0))
    if axes != list(range(-len(axes), 0)):
        return None
    sizes = value(new).shape[len(value(new).shape) - len(axes) :]
    if not all(isinstance(s, int) for s in sizes):
        return None
    kind = "rms_norm" if is_op(new, RMS_NORM) else "layer_norm"
    return Norm(kind, tuple(sizes), float(argument(new, "eps")), argument(new, "weight"), argument(new, "bias"))


def _same_call(old: fx.Node, new: fx.Node) -> bool:
    return old.target == new.target and same_program((old.args[1:], old.kwargs), (new.args[1:], new.kwargs))


def _nodes_by_module(program: Program, weights: frozenset[fx.Node]) -> dict[str, list[fx.Node]]:
    """What each module computes, its submodules included: nodes whose values something reads."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node in weights or not readers(node):
            continue
        if not isinstance(value(node), torch.Tensor):
            continue
        path = module_path(node)
        while path:
            found.setdefault(path, []).append(node)
            path = path.rpartition(".")[0]
    return found


def _firings(*nodes: fx.Node) -> frozenset[FiringKey]:
    """The rewrites that made these nodes or the weight programs behind them; else those that made what they read."""
    for depth in (0, 1, 2, 3):
        found = {key for node in nodes for key in _made_by(node, depth)}
        if found:
            return frozenset(found)
    return frozenset()


def _made_by(node: fx.Node, depth: int) -> Iterator[FiringKey]:
    if node.meta.get("firing"):
        yield node.meta["firing"]
    for source in node.all_input_nodes:
        if depth or source.meta.get("constant") or source.meta.get("bake"):
            yield from _made_by(source, max(0, depth - 1))
