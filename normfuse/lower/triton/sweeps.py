"""How often a long row is read: which reductions are taken in which sweep over it, and which two fit into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from normfuse.lower.triton.region import REDUCTIONS, Region, bare, centred_on, kind


@dataclass(frozen=True)
class Scaled:
    """sum(factor * exp(b - max(b))): scaled anew whenever the running maximum grows (Milakov & Gimelshein 2018)."""

    largest: fx.Node
    total: fx.Node
    exponential: fx.Node
    factor: fx.Node | None


@dataclass(frozen=True)
class Spread:
    """sum((v - mean(v))**2), by Welford's update in each lane and one merge of the lanes (Chan et al. 1983).

    Also where the mean of v - mean(v), which is its rounding, is taken off again: `rest` is the sum of that.
    """

    first: fx.Node
    squares: fx.Node
    rest: fx.Node | None = None


@dataclass
class Sweep:
    """What one reading of the row gives."""

    plain: list[fx.Node] = field(default_factory=list)
    scaled: list[Scaled] = field(default_factory=list)
    spread: list[Spread] = field(default_factory=list)


class Plan:
    """The sweeps of a region before the last one, which writes."""

    def __init__(self, region: Region, *, online: bool = True) -> None:
        self.region, self.online = region, online
        self.levels: dict[fx.Node, int] = {}
        self.pairs: dict[fx.Node, Scaled | Spread] = {}
        self.early: dict[fx.Node, fx.Node] = {}  # what a pair gives besides its own, with the first of these
        for _ in range(2):  # once to find the pairs, and again because they bring reductions forward
            for node in region.graph.nodes:
                if node.op != "output":
                    self.levels[node] = self._level(node)

    @cached_property
    def sweeps(self) -> list[Sweep]:
        reductions = [node for node in self.levels if kind(node) in REDUCTIONS]
        sweeps = [Sweep() for _ in range(max((self.levels[node] for node in reductions), default=0))]
        for node in reductions:
            sweep = sweeps[self.levels[node] - 1]
            match self.pairs.get(node):
                case Scaled() as pair:
                    sweep.scaled.append(pair)
                case Spread() as pair:
                    sweep.spread.append(pair)
                case None:
                    sweep.plain += [node] * (node not in self.early)
        return sweeps

    def _level(self, node: fx.Node) -> int:
        below = max((self.levels[each] for each in node.all_input_nodes), default=0)
        if kind(node) not in REDUCTIONS:
            return below
        if node in self.early and self.early[node] is not node:
            return self.levels[self.early[node]]
        for pair in self._candidates(node) if self.online else ():
            first, *others = _brought(pair)
            self.pairs[node] = pair
            self.early |= dict.fromkeys((first, *others), first)
            return self.levels[first]
        return below + 1

    def _candidates(self, node: fx.Node) -> Iterator[Scaled | Spread]:
        if kind(node) != "sum":
            return
        summed: Any = bare(node.args[0])
        first = centre(summed)
        if first is not None:
            before = centred_on(bare(first.args[0]))
            yield Spread(first, node) if before is None else Spread(before, node, first)
        for exponential, factor in self._factors(summed):
            largest = stabiliser(exponential)
            if largest is not None and (factor is None or self.levels[factor] < self.levels[largest]):
                yield Scaled(largest, node, exponential, factor)

    def _factors(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
        if kind(node) in ("exp", "exp2"):
            yield node, None
        if kind(node) == "mul":
            a, b = node.args
            for this, other in ((a, b), (b, a)):
                if isinstance(this, fx.Node) and isinstance(other, fx.Node) and kind(this) in ("exp", "exp2"):
                    yield this, other


def _brought(pair: Scaled | Spread) -> list[fx.Node]:
    """The reductions that a pair gives besides its own, the earliest first."""
    if isinstance(pair, Scaled):
        return [pair.largest]
    return [pair.first] if pair.rest is None else [pair.first, pair.rest]


def stabiliser(exponential: fx.Node) -> fx.Node | None:
    """max(b) where the node is exp(b - max(b))."""
    difference: Any = bare(exponential.args[0])
    if kind(difference) != "sub":
        return None
    b, largest = (bare(each) for each in difference.args)
    found = isinstance(largest, fx.Node) and kind(largest) == "amax" and bare(largest.args[0]) is b
    return largest if found else None


def centre(square: fx.Node) -> fx.Node | None:
    """sum(v) where the node is (v - sum(v) / columns)**2."""
    return centred_on(bare(square.args[0])) if kind(square) == "mul" and square.args[0] is square.args[1] else None
