"""Patterns are ordinary functions: called once with variables, they draw the subgraph that they look for.

    def pattern(x, g: Param, w: Param, b, eps):
        return op.linear(op.rms_norm(x, g, eps=eps), w, b)

A parameter annotated `Param` binds a parameter-only node, any other binds anything: a node, a number, None, a list. An
argument that the pattern leaves out must be at its default. `add` and `mul` match in either order. `op.maybe.to(x)`
matches `to(x)` and plain `x`; `op.any_of(p, q)` matches either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from normfuse.graph.node import arguments, aten, is_op, parameters_of

Bindings = Mapping[str, Any]


class Param:
    """Annotation of a pattern variable: a parameter-only node."""


@dataclass(frozen=True, eq=False)
class Variable:
    name: str
    parameter_only: bool = False
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    name: str
    packets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    optional: bool = False


@dataclass(frozen=True, eq=False)
class AnyOf:
    choices: tuple[Any, ...]


_COMMUTATIVE = {"add", "mul"}
_FREE = {"alpha"}  # `add(x, y)` means alpha=1, which is the default: checked like any other default
_FREE_WITH_DEFAULT = {
    "to": {"non_blocking", "copy", "memory_format", "layout", "device", "pin_memory"},
    "layer_norm": {"cudnn_enable"},
    "batch_norm": {"cudnn_enabled", "momentum"},
}


def packets(name: str) -> tuple[Any, ...]:
    found = [getattr(space, name) for space in (torch.ops.normfuse, aten) if hasattr(space, name)]
    if not found:
        raise AttributeError(f"no operator named {name!r}")
    return tuple(found[:1])


class _Namespace:
    def __init__(self, optional: bool = False) -> None:
        self._optional = optional

    def __getattr__(self, name: str) -> Callable[..., Call]:
        def draw(*args: Any, **kwargs: Any) -> Call:
            return Call(name, packets(name), args, tuple(kwargs.items()), self._optional)

        return draw


class _Op(_Namespace):
    maybe = _Namespace(optional=True)

    @staticmethod
    def any_of(*choices: Any) -> AnyOf:
        return AnyOf(choices)


op = _Op()


@dataclass(frozen=True)
class Pattern:
    """A drawn pattern; `match` yields every way in which it fits at a node."""

    name: str
    root: Any
    variables: tuple[str, ...]

    @staticmethod
    def of(function: Callable[..., Any]) -> Pattern:
        variables: list[Variable] = []
        for parameter in inspect.signature(function).parameters.values():
            text = str(parameter.annotation)
            variables.append(Variable(parameter.name, "Param" in text, "None" in text))
        return Pattern(function.__name__, function(*variables), tuple(v.name for v in variables))

    def roots(self) -> tuple[Any, ...]:
        """Operator packets at which the pattern can be rooted."""
        choices = self.root.choices if isinstance(self.root, AnyOf) else (self.root,)
        return tuple(packet for choice in choices for packet in choice.packets)

    def match(self, node: fx.Node, constants: Set[fx.Node]) -> Iterator[_Found]:
        return _match(self.root, node, _Found(), constants)


@dataclass(frozen=True)
class _Found:
    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    def bind(self, name: str, item: Any) -> _Found:
        return _Found({**self.bindings, name: item}, self.nodes)

    def visit(self, name: str, node: fx.Node) -> _Found:
        return _Found(self.bindings, {**self.nodes, name: node})


def _match(pattern: Any, item: Any, found: _Found, constants: Set[fx.Node]) -> Iterator[_Found]:
    if isinstance(pattern, Variable):
        yield from _match_variable(pattern, item, found, constants)
    elif isinstance(pattern, AnyOf):
        for choice in pattern.choices:
            yield from _match(choice, item, found, constants)
    elif isinstance(pattern, Call):
        if isinstance(item, fx.Node) and is_op(item, *pattern.packets):
            yield from _match_call(pattern, item, found, constants)
        if pattern.optional:
            yield from _match(pattern.args[0], item, found, constants)
    elif isinstance(pattern, list | tuple) and isinstance(item, list | tuple):
        if len(pattern) == len(item):
            yield from _match_all(list(zip(pattern, item, strict=True)), found, constants)
    elif type(pattern) in (int, float) and type(item) in (int, float):
        if pattern == item:
            yield found
    elif not isinstance(item, fx.Node) and pattern == item and type(pattern) is type(item):
        yield found


def _match_variable(pattern: Variable, item: Any, found: _Found, constants: Set[fx.Node]) -> Iterator[_Found]:
    if pattern.name in found.bindings:
        bound = found.bindings[pattern.name]
        if bound is item or (not isinstance(item, fx.Node) and type(bound) is type(item) and bound == item):
            yield found
        return
    if pattern.parameter_only:
        allowed = item in constants if isinstance(item, fx.Node) else item is None and pattern.optional
        if not allowed:
            return
    yield found.bind(pattern.name, item)


def _match_call(pattern: Call, node: fx.Node, found: _Found, constants: Set[fx.Node]) -> Iterator[_Found]:
    given = arguments(node)
    names = list(given)
    wanted = dict(zip(names, pattern.args, strict=False)) | dict(pattern.kwargs)
    if any(name not in given for name in wanted):
        return
    free = _FREE_WITH_DEFAULT.get(pattern.name, set())
    if any(not _at_default(node, name, given[name]) for name in names if name not in wanted and name not in free):
        return
    found = found.visit(pattern.name, node)
    pairs = [(wanted[name], given[name]) for name in wanted]
    yield from _match_all(pairs, found, constants)
    if pattern.name in _COMMUTATIVE and len(pairs) >= 2:
        swapped = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1]), *pairs[2:]]
        yield from _match_all(swapped, found, constants)


def _match_all(pairs: list[tuple[Any, Any]], found: _Found, constants: Set[fx.Node]) -> Iterator[_Found]:
    if not pairs:
        yield found
        return
    (pattern, item), rest = pairs[0], pairs[1:]
    for partial in _match(pattern, item, found, constants):
        yield from _match_all(rest, partial, constants)


def _at_default(node: fx.Node, name: str, given: Any) -> bool:
    for parameter in parameters_of(node):
        if parameter.name == name:
            default = parameter.default_value if parameter.has_default_value() else None
            return bool(given is default or (not isinstance(given, fx.Node) and given == default))
    return False
