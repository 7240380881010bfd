"""Places for parameters in a model: which name a use of a weight in the graph goes back to, and what it shall hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from normfuse.graph.node import shape
from normfuse.graph.program import Program
from normfuse.graph.walk import tensors_behind

Conflict = tuple[str, str, list[fx.Node]]

_PARAMETRIZED = re.compile(r"^(?P<path>.*?)\.?parametrizations\.(?P<name>\w+)\.original\d*$")
_OLD_STYLE = re.compile(r"^(?P<path>.*?)\.?(?P<name>\w+)_(?:g|v|orig|u)$")


@dataclass
class _Use:
    """One reader of a tensor of the model: from which module it reads, and the new weight (None: the old one)."""

    path: str
    new: fx.Node | None


@dataclass
class Slots:
    """Collects uses, then decides on one value for each name, or tells why there is none."""

    model: nn.Module
    program: Program
    uses: dict[str, list[_Use]] = field(default_factory=dict)
    fresh: dict[str, list[fx.Node]] = field(default_factory=dict)
    computed: dict[str, list[fx.Node]] = field(default_factory=dict)

    def use(self, weight: fx.Node, path: str, new: fx.Node | None) -> bool:
        """A module at `path` reads `weight` and shall read `new`. False if the model has no place for another value."""
        origin = self.program.origins[str(weight.target)]
        if new is not None and (origin.kind == "constant" or shape(new) != shape(weight)):
            return False
        self.uses.setdefault(str(weight.target), []).append(_Use(path, new))
        return True

    def keep_leaves(self, computed: fx.Node, path: str) -> None:
        """Everything that a computed weight depends on must stay as it is."""
        for leaf in tensors_behind(computed):
            self.use(leaf, path, None)

    def materialize(self, computed: fx.Node, new: fx.Node) -> bool:
        """The weight that a parametrization computes from parameters of its own becomes a parameter."""
        found = {name for leaf in tensors_behind(computed) if (name := self._reparameterized(str(leaf.target))) is not None}
        if len(found) != 1 or shape(new) != shape(computed):
            return False
        (name,) = found
        if shape(new) != _held_shape(self.model, name):
            return False
        self.computed.setdefault(name, []).append(new)
        return True

    def _reparameterized(self, leaf: str) -> str | None:
        if (hit := _PARAMETRIZED.match(leaf)) is not None:
            return _join(hit["path"], hit["name"])
        if (hit := _OLD_STYLE.match(leaf)) is not None and leaf_owner(self.model, leaf) is not None:
            module = self.model.get_submodule(hit["path"])
            hooks = module._forward_pre_hooks.values()
            if any(getattr(h, "name", None) == hit["name"] and hasattr(h, "compute_weight") for h in hooks):
                return _join(hit["path"], hit["name"])
        return None

    def add_bias(self, weight: fx.Node, path: str, new: fx.Node) -> bool:
        """The operator that reads `weight` in the module at `path` gets a bias: the module must have an empty place."""
        names = self._names(weight, path)
        for owner in {name.rpartition(".")[0] for name in names}:
            module = self.model.get_submodule(owner)
            empty = "bias" in module._parameters and module._parameters["bias"] is None
            if empty and (owner == path or len(names) == 1):
                self.fresh.setdefault(_join(owner, "bias"), []).append(new)
                return True
        return False

    def _names(self, weight: fx.Node, path: str) -> Sequence[str]:
        while weight.op != "get_attr" and weight.all_input_nodes:
            weight = weight.all_input_nodes[0]
        origin = self.program.origins.get(str(weight.target))
        names = [self._reparameterized(n) or n for n in origin.names] if origin is not None else []
        own = [name for name in names if name.rpartition(".")[0] == path]
        return own or names

    # -- deciding

    def resolve(self) -> tuple[dict[str, fx.Node], set[str], list[Conflict]]:
        """New values by qualified name, those that replace a computed weight, and the conflicts."""
        values: dict[str, fx.Node] = {}
        conflicts: list[Conflict] = []
        for target, uses in self.uses.items():
            self._resolve_uses(target, uses, values, conflicts)
        for name, wanted in [*self.fresh.items(), *self.computed.items()]:
            if any(not same_program(wanted[0], other) for other in wanted[1:]):
                conflicts.append((name, f"{name} is used at several places that need different values now", wanted))
            else:
                values[name] = wanted[0]
        return values, set(self.computed), conflicts

    def _resolve_uses(self, target: str, uses: list[_Use], values: dict[str, fx.Node], conflicts: list[Conflict]) -> None:
        """Tied names may part ways where each use can be told from the others by its module."""
        new = [use.new for use in uses if use.new is not None]
        if not new:
            return
        names = self.program.origins[target].names
        if len(new) == len(uses) and all(same_program(new[0], other) for other in new[1:]):
            values.update(dict.fromkeys(names, new[0]))
            return
        wanted: dict[str, list[fx.Node | None]] = {}
        for use in uses:
            own = [name for name in names if name.rpartition(".")[0] == use.path] or list(names)
            for name in own:
                wanted.setdefault(name, []).append(use.new)
        for name, nodes in wanted.items():
            if any(not same_program(nodes[0], other) for other in nodes[1:]):
                conflicts.append((name, f"{name} is used at several places that need different values now", new))
                return
        values.update({name: nodes[0] for name, nodes in wanted.items() if nodes[0] is not None})


def same_program(a: Any, b: Any) -> bool:
    """Do two weight programs (of a program and its copy, or of one program) compute the same from the same tensors?"""
    pending, seen = [(a, b)], set[tuple[int, int]]()
    while pending:
        a, b = pending.pop()
        if (id(a), id(b)) in seen or a is b:
            continue
        seen.add((id(a), id(b)))
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a.op != b.op or a.target != b.target:
                return False
            pending += [(a.args, b.args), (dict(a.kwargs), dict(b.kwargs))]
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            pending += zip(a, b, strict=True)
        elif isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
            pending += zip(a.values(), b.values(), strict=True)
        elif isinstance(a, fx.Node) or isinstance(b, fx.Node) or type(a) is not type(b) or a != b:
            return False
    return True


def leaf_owner(model: nn.Module, name: str) -> nn.Module | None:
    """The module that holds the tensor of this qualified name."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    return module if last in held else None


def _held_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a weight that a parametrization or a hook computes."""
    path, _, last = name.rpartition(".")
    return tuple(getattr(model.get_submodule(path), last).shape)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
