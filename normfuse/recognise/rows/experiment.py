"""Running a region in float64 on values of our own choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.promote import in_float64, promote
from normfuse.evaluate.sizes import Concrete, Impossible
from normfuse.graph.node import value
from normfuse.graph.roles import Role
from normfuse.recognise.rows.regions import Region


class Experiment:
    """One region, compiled: `run` gives the value of every node for a value of the source and values of the sides."""

    def __init__(self, region: Region, concrete: Concrete, seed: int) -> None:
        self.region = region
        self.concrete = concrete
        self.generator = torch.Generator().manual_seed(seed)
        self.signed = True
        self.shape = concrete.shape(region.source)
        self.runs = 0
        self._slots: dict[fx.Node, int] = {region.source: 0}
        for node in (*region.sides, *region.nodes):
            self._slots[node] = len(self._slots)
        self._calls = [self._compile(node) for node in region.nodes]
        self.sides = {node: self._draw(node) for node in region.sides}

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
        self.signed = False
        for node in self.free():
            self.sides[node] = self._draw(node)

    def other_sides(self) -> dict[fx.Node, Any]:
        """The free sides drawn once more, beside the draws of the experiment."""
        kept = self.generator
        self.generator = torch.Generator().manual_seed(kept.initial_seed() + 1)
        drawn = {node: self._draw(node) for node in self.free()}
        self.generator = kept
        return drawn

    def _draw(self, node: fx.Node) -> Any:
        role = self.concrete.roles(node)
        if role in (Role.SIZE, Role.FIXED):
            return self.concrete.fixed(node)
        val = value(node)
        if isinstance(val, torch.SymFloat | float):
            return 0.6 + float(torch.rand((), generator=self.generator))
        if not isinstance(val, Tensor):
            raise Impossible("a side is a tuple or an integer of the input")
        sizes = self.concrete.shape(node)
        if not val.is_floating_point():
            return torch.randint(0, 2, sizes, generator=self.generator).to(val.dtype)
        drawn = 0.6 + torch.rand(sizes, generator=self.generator, dtype=torch.float64)
        if self.signed:
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
        with torch.no_grad():
            for place, target, args, kwargs in self._calls:
                try:
                    filled = [_fill(a, slots) for a in args]
                    slots[place] = in_float64(target, filled, {k: _fill(v, slots) for k, v in kwargs.items()})
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
