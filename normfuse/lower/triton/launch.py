"""Runs the kernels of a row region: source to compiled function, matrices to pointers and strides."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoweringError
from normfuse.lower.triton import tune
from normfuse.lower.triton.backward import differentiate
from normfuse.lower.triton.emit import Source, emit
from normfuse.lower.triton.region import Argument, Region, extent, repeats, trace


@dataclass(frozen=True)
class RowKernel:
    """A row function in torch and in Triton: its region, the regions of its gradients, and their kernels."""

    region: Region
    online: bool = True
    _regions: dict[Any, Region] = field(default_factory=dict, repr=False)
    _sources: dict[Any, Source] = field(default_factory=dict, repr=False)

    def backward(self, wanted: tuple[bool, ...]) -> Region:
        """The region of the gradients for the inputs that are wanted."""
        if wanted not in self._regions:
            self._regions[wanted] = differentiate(self.region, wanted)
        return self._regions[wanted]

    def source(self, schedule: str, wanted: tuple[bool, ...] | None = None) -> Source:
        """The kernel's text, forward or (with `wanted`) backward."""
        key = (schedule, wanted)
        if key not in self._sources:
            region = self.region if wanted is None else self.backward(wanted)
            self._sources[key] = emit(region, schedule, online=self.online)
        return self._sources[key]

    def forward(self, *matrices: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the forward kernel for matrices in the extents of the region's inputs."""
        return self._run(self.region, None, matrices)

    def gradients(self, matrices: Sequence[Tensor], wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """The gradients that are wanted, from the inputs followed by the outputs' gradients."""
        return self._run(self.backward(wanted), wanted, tuple(matrices))

    def config(self, columns: int, *, backward: bool) -> tune.Config:
        return tune.config(columns, self.region.wide.itemsize, backward=backward, wave=64 if torch.version.hip else 32)

    def supports(self, columns: int) -> str | None:
        """Why rows of this width have no kernel, or None."""
        try:
            self.source(self.config(columns, backward=False).schedule)
            self.source(self.config(columns, backward=True).schedule, tuple(True for _ in self.region.inputs))
        except LoweringError as reason:
            return str(reason)
        return None

    def _run(self, region: Region, wanted: tuple[bool, ...] | None, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, columns = size(region, given)
        chosen = self.config(columns, backward=wanted is not None)
        source = self.source(chosen.schedule, wanted)
        return launch(region, source, chosen, [_readable(each) for each in given], rows, columns)


def size(region: Region, matrices: Sequence[Tensor]) -> tuple[int, int]:
    """Rows and columns of what the region is given."""
    first = next(m for node, m in zip(region.inputs, matrices, strict=True) if extent(node).rows and extent(node).columns)
    return first.shape[0], first.shape[1]


@lru_cache(maxsize=4096)
def row_kernel(
    name: str,
    reference: Callable[..., Any],
    arguments: tuple[Argument, ...],
    results: tuple[str, ...] = ("y",),
    options: tuple[tuple[str, Any], ...] = (),
    online: bool = True,
) -> RowKernel:
    """The kernels of a reference, which takes matrices and options by name; the same question has the same answer."""
    names = [argument.name for argument in arguments]

    def bound(*matrices: Tensor) -> Any:
        return reference(**dict(zip(names, matrices, strict=True)), **dict(options))

    return RowKernel(trace(name, bound, arguments, results), online)


def interpreted() -> bool:
    """Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unavailable(device: torch.device) -> str | None:
    """Why no kernel can run on a device, or None."""
    if "triton" not in sys.modules and find_spec("triton") is None:
        return "triton is not installed: pip install triton, or kernel='reference'"
    if device.type == "cpu" and not interpreted():
        return "kernel='triton' needs a GPU tensor, or TRITON_INTERPRET=1 to interpret it on the CPU"
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernel runs on {device.type}: use kernel='reference'"
    return None


def launch(
    region: Region, source: Source, chosen: tune.Config, given: Sequence[Tensor], rows: int, columns: int
) -> tuple[Tensor, ...]:
    """One launch, and where the kernel sums over rows the second, small reduction over its programs."""
    device = given[0].device
    tiles = -(-rows // chosen.rows)
    grid = min(tiles, tune.programs(device.type, device.index)) if source.accumulates else tiles
    outputs = [_output(region, i, source, max(grid, 1), rows, columns, device) for i in range(len(region.results))]
    if rows and columns:
        strides = [m.stride(0) for m, node in zip(given, region.inputs, strict=True) if _matrix(node)]
        strides += [m.shape[0] for m, node in zip(given, region.inputs, strict=True) if repeats(node)]
        constants = {"ROWS": chosen.rows} if chosen.schedule == "tile" else {}
        kernel = compiled(source.name, source.text, interpreted())
        with _hardware_rounding() if device.type == "cpu" else torch.cuda.device(device):
            kernel[(grid,)](
                *given,
                *outputs,
                *strides,
                rows,
                columns,
                BLOCK=chosen.block,
                num_warps=chosen.warps,
                enable_fp_fusion=True,
                **constants,
            )
    return tuple(_left(region, i, output) for i, output in enumerate(outputs))


@lru_cache(maxsize=4096)
def compiled(name: str, text: str, interpret: bool) -> Any:
    """The kernel of a source. Triton reads the text of what it compiles, so the text is where Python looks for it."""
    path = f"<normfuse {name} {abs(hash(text)):x}>"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    space: dict[str, Any] = {"__name__": f"normfuse_{name}"}
    exec(compile(text, path, "exec"), space)
    return space[name]


@contextlib.contextmanager
def _hardware_rounding() -> Generator[None]:
    """The interpreter cuts float32 off to bfloat16; the hardware rounds to the nearest, ties to even, and so does this."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder: Any = InterpreterBuilder
    cut = builder.create_fp_trunc

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cut(self, source, target)
        nearest = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(nearest.numpy(), target.scalar)

    builder.create_fp_trunc = rounded
    try:
        yield
    finally:
        builder.create_fp_trunc = cut


def _output(region: Region, index: int, source: Source, grid: int, rows: int, columns: int, device: torch.device) -> Tensor:
    result = region.results[index].extent
    width = columns if result.columns else 1
    if region.summed[index]:  # a row of sums for each program; sweeps add to it block by block
        make = torch.zeros if source.schedule == "sweeps" or not rows else torch.empty
        return make(grid, width, dtype=region.wide, device=device)
    return torch.empty(rows, width, dtype=result.dtype, device=device)


def _left(region: Region, index: int, output: Tensor) -> Tensor:
    dtype = region.results[index].extent.dtype
    return output.sum(0, keepdim=True).to(dtype) if region.summed[index] else output


def _readable(matrix: Tensor) -> Tensor:
    """Rows may have any stride, columns lie side by side."""
    return matrix if matrix.shape[1] == 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _matrix(node: Any) -> bool:
    return extent(node).rows and extent(node).columns
