"""Triton source of a region, as a person would write it.

Two schedules. A *tile* holds whole rows in registers: ROWS of them, BLOCK columns wide. *Sweeps* read a long row in
blocks as often as its statistics need, and once more to write. Everything is computed wide (float32, float64 for
float64) and rounded where the reference rounds. The order of every sum follows from the width of the row alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from normfuse.lower.triton.lanes import SweepWriter
from normfuse.lower.triton.region import Argument, Region, extent, halvings, kind, repeats
from normfuse.lower.triton.steps import HELPERS, Printer, Writer, bracketed, closure
from normfuse.lower.triton.sweeps import Plan


@dataclass(frozen=True)
class Source:
    """A kernel as the text of a module; `accumulates`: its programs go over many rows and sum over them."""

    name: str
    text: str
    schedule: str
    accumulates: bool

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def pointers(self, region: Region) -> list[str]:
        """The pointers of the kernel's signature: inputs, then results."""
        return [f"{node.name}_ptr" for node in region.inputs] + [f"{result.name}_ptr" for result in region.results]

    def dtypes(self, region: Region) -> list[torch.dtype]:
        """What they point to. Sums over rows leave wide, for the second reduction."""
        given = [extent(node).dtype for node in region.inputs]
        results = zip(region.results, region.summed, strict=True)
        return given + [region.wide if summed else result.extent.dtype for result, summed in results]


def emit(region: Region, schedule: str, *, online: bool = True) -> Source:
    """The kernel of a region in the schedule `"tile"` or `"sweeps"`, as a module that imports nothing but triton."""
    return _Emitter(region, schedule, Plan(region, online=online)).source()


class _Emitter(Writer):
    def __init__(self, region: Region, schedule: str, plan: Plan) -> None:
        super().__init__(region, schedule)
        self.plan = plan
        self.accumulating = region.summed

    # --- the frame of a kernel

    def source(self) -> Source:
        self.tile() if self.schedule == "tile" else self.sweeps()
        head = ["import triton", "import triton.language as tl", ""]
        helpers = "".join(text + "\n" for name, text in HELPERS.items() if name in self.helpers)
        name = f"{self.region.name}_{self.schedule}"
        text = "\n".join([*head, *helpers.splitlines(), "", *self.signature(name), *self.lines]) + "\n"
        return Source(name, text, self.schedule, any(self.accumulating))

    def signature(self, name: str) -> list[str]:
        pointers = [f"{node.name}_ptr" for node in self.region.inputs] + [f"{r.name}_ptr" for r in self.region.results]
        strides = [f"{node.name}_stride" for node in self.region.inputs if extent(node).rows and extent(node).columns]
        strides += [f"{node.name}_period" for node in self.region.inputs if repeats(node)]
        constants = ["ROWS: tl.constexpr"] if self.schedule == "tile" else []
        parameters = ", ".join([*pointers, *strides, "rows", "columns", *constants, "BLOCK: tl.constexpr"])
        inputs = ", ".join(node.name for node in self.region.inputs)
        given = f'    """{", ".join(r.name for r in self.region.results)} from {inputs}: {self.about()}"""'
        frame = [f"def {name}(", *_wrapped(f"    {parameters},", "    "), "):"]
        return ['@triton.jit(do_not_specialize=["rows"])', *frame, *_wrapped(given, "    ")]

    def about(self) -> str:
        if self.schedule == "tile":
            return "ROWS rows at once, each in one block."
        thresholds = sum(kind(node) == "threshold" for sweep in self.plan.sweeps for node in sweep.plain)
        reads = len(self.plan.sweeps) + thresholds * halvings(self.region.wide)
        return f"one row at once, read {reads} time{'s' * (reads != 1)} for its statistics and once to write."

    def tile(self) -> None:
        self.head("tl.program_id(0) * ROWS", "ROWS")
        self.write("row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)")
        self.write("inside = (row < rows) & (col < columns)")
        self.comment("the rows, held in registers from here on; beyond their ends loads give zero")
        self.section(dict(enumerate(self.region.outputs)))
        self.foot()

    def sweeps(self) -> None:
        self.head("tl.program_id(0)", "1")
        self.write("row = (first + tl.arange(0, 1)[:, None]).to(tl.int64)")
        for number, sweep in enumerate(self.plan.sweeps, 1):
            SweepWriter(self, sweep, number).write()
        numbers = {i: node for i, node in enumerate(self.region.outputs) if not extent(node).columns}
        matrices = {i: node for i, node in enumerate(self.region.outputs) if extent(node).columns}
        self.section(numbers)
        if matrices:
            self.comment("the results, block by block")
            self.statistics(closure(matrices.values(), self.known))
            self.loop()
            self.section(matrices)
        self.foot()

    def head(self, first: str, step: str) -> None:
        """Where a program starts; with sums over rows it goes on to further rows in a fixed order."""
        if self.schedule == "tile":
            self.write("col = tl.arange(0, BLOCK)[None, :]")
            self.parameters(columns=True)
        else:
            self.write("lane = tl.arange(0, BLOCK)[None, :]")
            self.parameters(columns=False)
        if not any(self.accumulating):
            self.write(f"first = {first}")
            return
        self.comment("sums over the rows of this program, in a fixed order; a second reduction adds the programs")
        for result in self.sums:
            if not (result.extent.columns and self.schedule == "sweeps"):
                shape = f"[{step}, {'BLOCK' if result.extent.columns else '1'}]"
                self.write(f"{result.name} = tl.zeros({shape}, {self.wide})")
        self.write(f"for first in range({first}, rows, tl.num_programs(0){'' if step == '1' else ' * ' + step}):")
        self.indent += 1

    @property
    def sums(self) -> list[Argument]:
        return [result for result, sums in zip(self.region.results, self.accumulating, strict=True) if sums]

    def foot(self) -> None:
        if not any(self.accumulating):
            return
        self.indent = 1
        for result in self.sums:
            total = f"tl.sum({result.name}, axis=0, keep_dims=True)"
            if not result.extent.columns:
                self.write(f"tl.store({result.name}_ptr + tl.program_id(0) + tl.arange(0, 1)[:, None], {total})")
            elif self.schedule == "tile":
                self.write(f"at = {result.name}_ptr + tl.program_id(0).to(tl.int64) * columns + col")
                self.write(f"tl.store(at, {total}, mask=col < columns)")

    def parameters(self, *, columns: bool) -> None:
        """Loads that do not depend on the row."""
        for node in self.region.inputs:
            if node.users and not extent(node).rows and (columns or not extent(node).columns):
                self.known[node] = self.load(node)

    # --- steps

    def section(self, results: Mapping[int, fx.Node]) -> None:
        """Everything that these outputs need, then the outputs."""
        printer = self.printer(results.values())
        printer.loads()
        for index, node in results.items():
            self.leave(index, node, printer)

    def leave(self, index: int, node: fx.Node, printer: Printer) -> None:
        result = self.region.results[index]
        value = printer.value(node)
        name, given = result.name, result.extent
        if not self.accumulating[index]:
            at = f"{name}_ptr + row * columns + col" if given.columns else f"{name}_ptr + row"
            mask = "inside" if given.columns else "row < rows"
            self.write(f"tl.store({at}, {value}, mask={mask})")
        elif given.columns and self.schedule == "sweeps":
            self.write(f"at = {name}_ptr + tl.program_id(0).to(tl.int64) * columns + col")
            self.write(f"tl.store(at, tl.load(at, mask=inside) + {bracketed(value)}, mask=inside)")
        elif given.columns:
            self.write(f"{name} += tl.where(inside, {value}, 0.0)")
        else:
            self.write(f"{name} += tl.where(row < rows, {value}, 0.0)")


def _wrapped(line: str, indent: str, width: int = 110) -> list[str]:
    if len(line) <= width:
        return [line]
    cut = line.rindex(" ", 0, width)
    return [line[:cut], *_wrapped(indent + line[cut + 1 :], indent, width)]
