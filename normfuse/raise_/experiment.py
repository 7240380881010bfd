"""Running a region in float64 on values of our own choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.evaluate import default_float64, promote
from normfuse.node import expression, shape, value
from normfuse.program import Program
from normfuse.raise_.regions import Region
from normfuse.raise_.roles import Role, Roles

_SMALL = (2, 3, 5, 4, 7, 6)
_HASHED = 1 << 14


class Impossible(Exception):
    """A region that cannot be run here: its sizes cannot be chosen, an operator fails."""


class Concrete:
    """Numbers for the free sizes of a program, and the values of its fixed nodes at those sizes."""

    def __init__(self, program: Program, roles: Roles, *, small: bool = True, variant: int = 0) -> None:
        """`small`: sizes of our own, else those of the example; each `variant` of either has other sizes."""
        self.program = program
        self.roles = roles
        self.small = small
        self.variant = variant
        self._sizes: dict[Any, int] = {}
        self._symbols: dict[Any, int] = {}
        self._fixed: dict[fx.Node, Any] = {}

    def size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = expression(size)
        if expr.is_number:
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._choose(size, expr)
        return self._sizes[expr]

    def _choose(self, size: torch.SymInt, expr: Any) -> int:
        if not self.small:
            hint = size.node.hint
            if hint is None:
                raise Impossible("a size is not known")
            return int(hint) * (self.variant + 1)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._symbols:
                self._symbols[symbol] = self._in_range(str(symbol))
        chosen = expr.xreplace({s: self._symbols[s] for s in expr.free_symbols})
        if int(chosen) != chosen or int(chosen) < 2:
            raise Impossible("a size would vanish")
        return int(chosen)

    def _in_range(self, symbol: str) -> int:
        """A small size that the program takes, and not its least: there a slice up to a fixed position is still whole."""
        low, high = self.program.signature.ranges.get(symbol, (0, 2**62))
        small = _SMALL[(len(self._symbols) + 2 * self.variant) % len(_SMALL)] + self.variant
        return min(max(small, low + 1 + small if low > _SMALL[0] else low), high)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(int(self.size(s)) for s in shape(node))

    def fixed(self, node: fx.Node) -> Any:
        """The float64 value of a node that depends on sizes, literals and buffers alone."""
        if node in self._fixed:
            return self._fixed[node]
        result: Any
        if node.op == "get_attr":
            tensor = self.program.tensors[str(node.target)]
            if tensor.device.type == "meta":
                raise Impossible("a buffer is not known")
            result = promote(tensor)
        elif isinstance(value(node), torch.SymInt):
            result = self.size(value(node))
        else:
            result = self._call(node)
        self._fixed[node] = result
        return result

    def _call(self, node: fx.Node) -> Any:
        def fetch(n: fx.Node) -> Any:
            if self.roles(n) is Role.ACTIVATION or self.roles(n) is Role.WEIGHT:
                val = value(n)  # it lends its shape alone
                return torch.zeros(self.shape(n), dtype=promote(val.dtype))
            return self.fixed(n)

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fetch)
        args, kwargs = pytree.tree_map(promote, (args, kwargs))
        args, kwargs = pytree.tree_map(self.size, (args, kwargs))
        with torch.no_grad(), default_float64():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def describe(self, node: fx.Node) -> Any:
        """What a region's function depends on in a side: the value of a fixed one, nothing of others."""
        role = self.roles(node)
        if role is Role.SIZE:
            return str(expression(value(node)))
        if role is not Role.FIXED:
            return None
        try:
            tensor = self.fixed(node)
        except Exception:
            return node.name
        if not isinstance(tensor, Tensor) or tensor.numel() > _HASHED:
            return node.name
        return hash(tensor.contiguous().cpu().numpy().tobytes())


class Experiment:
    """One region, compiled: `run` gives the value of every node for a value of the source and values of the sides."""

    def __init__(self, region: Region, concrete: Concrete, seed: int) -> None:
        self.region = region
        self.concrete = concrete
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = concrete.shape(region.source)
        self.runs = 0
        self._slots: dict[fx.Node, int] = {region.source: 0}
        for node in (*region.sides, *region.nodes):
            self._slots[node] = len(self._slots)
        self._calls = [self._compile(node) for node in region.nodes]
        self.sides = {node: self._draw(node, signed=True) for node in region.sides}

    def _compile(self, node: fx.Node) -> tuple[int, Any, Any, Any]:
        def prepare(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return _Slot(self._slots[item])
            if isinstance(item, list | tuple):
                return [prepare(i) for i in item]
            if isinstance(item, torch.device):
                return torch.device("cpu")
            return self.concrete.size(promote(item))

        args = [prepare(a) for a in node.args]
        kwargs = {k: prepare(v) for k, v in node.kwargs.items()}
        return self._slots[node], node.target, args, kwargs

    def free(self) -> list[fx.Node]:
        """The sides that stand for any value."""
        return [n for n in self.region.sides if self.concrete.roles(n) in (Role.WEIGHT, Role.ACTIVATION)]

    def positive_sides(self) -> None:
        """Draw the free sides positive: some weights stand under a root."""
        for node in self.free():
            self.sides[node] = self._draw(node, signed=False)

    def _draw(self, node: fx.Node, *, signed: bool) -> Any:
        role = self.concrete.roles(node)
        if role in (Role.SIZE, Role.FIXED):
            return self.concrete.fixed(node)
        val = value(node)
        if not isinstance(val, Tensor):
            raise Impossible("a side is a tuple")
        sizes = self.concrete.shape(node)
        if not val.is_floating_point():
            return torch.randint(0, 2, sizes, generator=self.generator).to(val.dtype)
        drawn = 0.6 + torch.rand(sizes, generator=self.generator, dtype=torch.float64)
        if signed:
            flips = torch.rand(sizes, generator=self.generator) < 0.3
            drawn = torch.where(flips, -drawn, drawn)
        return drawn

    def draw(self, scale: float = 1.0) -> Tensor:
        """Rows with means along every axis, no two entries alike."""
        x = torch.randn(self.shape, generator=self.generator).double()  # five times as fast as drawing in float64
        for axis, size in enumerate(self.shape):
            offset = 0.5 * torch.randn(size, generator=self.generator, dtype=torch.float64)
            x = x + offset.view([-1 if a == axis else 1 for a in range(len(self.shape))])
        return (x + 0.3) * scale

    def run(self, x: Tensor, sides: Mapping[fx.Node, Any] | None = None) -> dict[fx.Node, Any]:
        """Values of all nodes. A node whose operator fails has no value, nor what follows it."""
        self.runs += 1
        given = self.sides if sides is None else {**self.sides, **sides}
        slots: list[Any] = [None] * len(self._slots)
        slots[0] = x
        for node, v in given.items():
            slots[self._slots[node]] = v
        with torch.no_grad(), default_float64():
            for place, target, args, kwargs in self._calls:
                try:
                    slots[place] = target(
                        *[_fill(a, slots) for a in args], **{k: _fill(v, slots) for k, v in kwargs.items()}
                    )
                except Exception:
                    slots[place] = _FAILED
        return {node: slots[self._slots[node]] for node in self.region.nodes if slots[self._slots[node]] is not _FAILED}


class _Slot:
    __slots__ = ("place",)

    def __init__(self, place: int) -> None:
        self.place = place


class _Failed:
    pass


_FAILED = _Failed()


def _fill(item: Any, slots: list[Any]) -> Any:
    if isinstance(item, _Slot):
        return slots[item.place]
    if isinstance(item, list):
        return [_fill(i, slots) for i in item]
    return item


def numel(sizes: tuple[int, ...]) -> int:
    return math.prod(sizes)
