"""One sweep over a long row: statistics lane by lane in a loop over blocks, and across the lanes after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from normfuse.lower.triton.region import halvings, kind
from normfuse.lower.triton.steps import Printer, Writer, bracketed, closure
from normfuse.lower.triton.sweeps import Scaled, Spread, Sweep


class SweepWriter:
    """One sweep over a long row: lane by lane in the loop, across the lanes after it."""

    def __init__(self, writer: Writer, sweep: Sweep, number: int) -> None:
        self.to, self.sweep, self.number = writer, sweep, number
        self.after: list[Callable[[], None]] = []

    def write(self) -> None:
        thresholds = [node for node in self.sweep.plain if kind(node) == "threshold"]
        if thresholds != self.sweep.plain or self.sweep.scaled or self.sweep.spread:
            self.lane_by_lane([node for node in self.sweep.plain if node not in thresholds])
        for node in thresholds:
            self.threshold(node)

    def lane_by_lane(self, plain: list[fx.Node]) -> None:
        self.to.comment(f"sweep {self.number}: the statistics, lane by lane, then across the lanes")
        targets: list[Any] = [each.args[0] for each in plain]
        maxima = list(dict.fromkeys(pair.largest for pair in self.sweep.scaled))
        targets += [each.args[0] for each in maxima]
        targets += [pair.factor for pair in self.sweep.scaled if pair.factor is not None]
        targets += [pair.first.args[0] for pair in self.sweep.spread]
        self.to.statistics(closure(targets, self.to.known))
        steps = [self.plain(node) for node in plain]
        steps += [self.scaled(node, [p for p in self.sweep.scaled if p.largest is node]) for node in maxima]
        steps += [self.spread(pair) for pair in self.sweep.spread]
        self.to.loop()
        printer = self.to.printer(targets)
        printer.loads()
        for step in steps:
            step(printer)
        self.to.indent -= 1
        for finish in self.after:
            finish()

    def lanes(self, base: str, fill: str = "0.0") -> str:
        name = self.to.fresh(base)
        self.to.write(f"{name} = tl.full([1, BLOCK], {fill}, {self.to.wide})")
        return name

    def finish(self, node: fx.Node, text: str) -> None:
        name = self.to.name(node)
        self.to.write(f"{name} = {text}")
        self.to.known[node] = name

    def plain(self, node: fx.Node) -> Callable[[Printer], None]:
        if kind(node) == "sum":
            lanes = self.lanes("sums")
            self.after.append(lambda: self.finish(node, f"tl.sum({lanes}, axis=1, keep_dims=True)"))
            return lambda printer: self.to.write(f"{lanes} += {printer.masked(node.args[0], '0.0')}")  # type: ignore[arg-type]
        lanes = self.lanes("maxima", 'float("-inf")')
        self.after.append(lambda: self.finish(node, f"tl.max({lanes}, axis=1, keep_dims=True)"))

        def step(printer: Printer) -> None:
            masked = printer.masked(node.args[0], 'float("-inf")')  # type: ignore[arg-type]
            self.to.write(f"{lanes} = tl.maximum({lanes}, {masked})")

        return step

    def threshold(self, node: fx.Node) -> None:
        """t with sum(max(z - t, 0)**power) = 1: a sweep for each halving of [-1, 0], and one for a step of Newton's."""
        to, z, power = self.to, node.args[0], node.args[1]
        count = halvings(to.region.wide)
        to.comment(f"sweeps from {self.number} on: halve [-1, 0]; the last, at the lower end, is for a step of Newton's")
        to.statistics(closure([z], to.known))  # type: ignore[list-item]
        low, high, total, slope = (to.fresh(name) for name in ("low", "high", "total", "slope"))
        for name, start in ((low, "-1.0"), (high, "0.0"), (total, "0.0"), (slope, "1.0")):
            to.write(f"{name} = tl.full([1, 1], {start}, {to.wide})")
        to.write(f"for halving in range({count + 1}):")
        to.indent += 1
        to.write(f"middle = tl.where(halving < {count}, 0.5 * ({low} + {high}), {low})")
        sums, slopes = self.lanes("sums"), self.lanes("slopes")
        to.loop()
        printer = to.printer([z])  # type: ignore[list-item]
        printer.loads()
        above = f"tl.maximum({bracketed(printer.value(z))} - middle, 0.0, propagate_nan=tl.PropagateNan.ALL)"
        to.write(f"over = tl.where(inside, {above}, 0.0)")
        to.write(f"{sums} += {'over' if power == 1 else 'over * over'}")
        to.write(f"{slopes} += {'tl.where(over > 0.0, 1.0, 0.0)' if power == 1 else '2.0 * over'}")
        to.indent -= 1
        to.write(f"{total} = tl.sum({sums}, axis=1, keep_dims=True)")
        to.write(f"{slope} = tl.sum({slopes}, axis=1, keep_dims=True)")
        to.write(f"{low} = tl.where({total} >= 1.0, middle, {low})")
        to.write(f"{high} = tl.where({total} >= 1.0, {high}, middle)")
        to.indent -= 1
        self.finish(node, f"{low} + ({total} - 1.0) / {slope}")

    def scaled(self, largest: fx.Node, pairs: list[Scaled]) -> Callable[[Printer], None]:
        to = self.to
        power = kind(pairs[0].exponential)
        maxima, sums = self.lanes("maxima", 'float("-inf")'), [self.lanes("sums") for _ in pairs]

        def step(printer: Printer) -> None:
            b: Any = largest.args[0]
            value = printer.named(b)
            to.write(f'higher = tl.maximum({maxima}, tl.where(inside, {value}, float("-inf")))')
            to.write('finite = tl.where(higher == float("-inf"), 0.0, higher)', "nothing but -inf so far")
            to.write(f"shrink = tl.{power}({maxima} - finite)")
            to.write(f"grown = tl.where(inside, tl.{power}({value} - finite), 0.0)")
            for lanes, pair in zip(sums, pairs, strict=True):
                grown = "grown" if pair.factor is None else f"{bracketed(printer.value(pair.factor))} * grown"
                to.write(f"{lanes} = {lanes} * shrink + {grown}")
            to.write(f"{maxima} = higher")

        def finish() -> None:
            self.finish(largest, f"tl.max({maxima}, axis=1, keep_dims=True)")
            name = to.known[largest]
            to.write(f'finite = tl.where({name} == float("-inf"), 0.0, {name})')
            to.write(f"shrink = tl.{power}({maxima} - finite)")
            for lanes, pair in zip(sums, pairs, strict=True):
                self.finish(pair.total, f"tl.sum({lanes} * shrink, axis=1, keep_dims=True)")

        self.after.append(finish)
        return step

    def spread(self, pair: Spread) -> Callable[[Printer], None]:
        to = self.to
        means, squares = self.lanes("means"), self.lanes("squares")

        def step(printer: Printer) -> None:
            value = printer.named(pair.first.args[0])
            to.write(f"change = tl.where(inside, {value} - {means}, 0.0)")
            to.write(f"{means} += change / (start // BLOCK + 1)")
            to.write(f"{squares} += change * ({value} - {means})")

        def finish() -> None:
            to.write(f"counts = tl.cdiv(tl.maximum(columns - lane, 0), BLOCK).to({to.wide})")
            self.finish(pair.first, f"tl.sum({means} * counts, axis=1, keep_dims=True)")
            to.write(f"apart = {means} - {to.known[pair.first]} / columns")
            if pair.rest is not None:
                self.finish(pair.rest, "tl.sum(apart * counts, axis=1, keep_dims=True)")
                to.write(f"apart -= {to.known[pair.rest]} / columns")
            self.finish(pair.squares, f"tl.sum({squares} + counts * apart * apart, axis=1, keep_dims=True)")

        self.after.append(finish)
        return step
