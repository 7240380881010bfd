"""Kernels compiled for a GPU that is not there, and what the machine code says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normfuse.errors import LoweringError
from normfuse.lower.triton import tune
from normfuse.lower.triton.emit import Source
from normfuse.lower.triton.launch import RowKernel, compiled
from normfuse.lower.triton.region import Region, extent

# What a multiprocessor must have under way to keep the memory busy (Little's law): bandwidth in bytes per second times
# latency in seconds over multiprocessors, then registers, threads and blocks of one. Vendors' figures; latencies measured.
MACHINES = {
    "sm_80": (2.0e12, 600e-9, 108), "sm_90": (3.35e12, 700e-9, 132), "sm_100": (8.0e12, 800e-9, 148),
}  # fmt: skip
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 160 * 1024

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Facts:
    """What was read from the machine code of a kernel. `loads` and `stores` count global accesses by width in bits."""

    target: str
    config: tune.Config
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]

    def in_flight(self, row_bytes: int) -> int:
        """Bytes that a multiprocessor has under way when each of its programs loads its block at once."""
        threads = self.config.warps * 32
        resident = min(
            REGISTERS // (max(self.registers, 16) * threads), THREADS // threads, BLOCKS, SHARED // max(self.shared, 1024)
        )
        return resident * self.config.rows * row_bytes

    def needed(self) -> float:
        """What Little's law asks of this target."""
        bandwidth, latency, multiprocessors = MACHINES[self.target]
        return bandwidth * latency / multiprocessors


def compile_ahead(
    kernel: RowKernel,
    columns: int,
    target: str,
    wanted: tuple[bool, ...] | None = None,
    *,
    config: tune.Config | None = None,
) -> Facts:
    """Forward, or with `wanted` backward, for rows of this many columns on `"sm_90"`, `"gfx942"` and so on.

    Raises:
        LoweringError: under the interpreter, where nothing is compiled.
    """
    region = kernel.region if wanted is None else kernel.backward(wanted)
    wave = 64 if target.startswith("gfx") else 32
    chosen = config or tune.config(columns, region.wide.itemsize, backward=wanted is not None, wave=wave)
    return read(compile_source(region, kernel.source(chosen.schedule, wanted), chosen, columns, target), chosen, target)


def compile_source(region: Region, source: Source, chosen: tune.Config, columns: int, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    function = compiled(source.name, source.text, False)
    if not isinstance(function, JITFunction):
        raise LoweringError("kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET")
    signature, constants, aligned = {}, {}, {}
    pointers = dict(zip(source.pointers(region), source.dtypes(region), strict=True))
    for place, name in enumerate(function.arg_names):
        if name in ("ROWS", "BLOCK"):
            signature[name], constants[(place,)] = "constexpr", chosen.rows if name == "ROWS" else chosen.block
        else:
            signature[name] = _POINTERS[pointers[name]] if name in pointers else "i32"
            if name in pointers or (columns % 16 == 0 and name != "rows" and not name.endswith("_period")):
                aligned[(place,)] = [["tt.divisibility", 16]]
    hip = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": chosen.warps, "enable_fp_fusion": True}
    return triton.compile(ASTSource(function, signature, constants, aligned), target=machine, options=options)


def read(binary: Any, chosen: tune.Config, target: str) -> Facts:
    if target.startswith("gfx"):
        return _read_amd(binary.asm["amdgcn"], binary.metadata.shared, chosen, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    registers = max(int(found) for found in re.findall(r"REG:(\d+)", usage))
    local = max(int(found) for found in re.findall(r"LOCAL:(\d+)", usage) + re.findall(r"STACK:(\d+)", usage))
    spilled = max(local, len(re.findall(r"\b(?:LDL|STL)\b", code)))
    loads = Counter(_width(found) for found in re.findall(r"\bLDG\.E(\S*)", code))
    stores = Counter(_width(found) for found in re.findall(r"\bSTG\.E(\S*)", code))
    return Facts(target, chosen, registers, spilled, binary.metadata.shared, dict(loads), dict(stores))


def _width(suffix: str) -> int:
    found = re.search(r"\b(256|128|64|U?S?16|U?S?8)\b", suffix.replace(".", " "))
    return int(found.group().lstrip("US")) if found else 32


def _read_amd(code: str, shared: int, chosen: tune.Config, target: str) -> Facts:
    registers = max(int(found) for found in re.findall(r"\.vgpr_count:\s*(\d+)", code))
    spilled = sum(int(found) for found in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", code))
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}
    loads = Counter(widths[found] for found in re.findall(r"\b(?:global|buffer)_load_(dwordx\d|dword|ushort|ubyte)", code))
    stores = Counter(widths[found] for found in re.findall(r"\b(?:global|buffer)_store_(dwordx\d|dword|short|byte)", code))
    return Facts(target, chosen, registers, spilled, shared, dict(loads), dict(stores))


def _tool(name: str, *arguments: str) -> str:
    """A disassembler of triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def matrix_bytes(region: Region, columns: int) -> tuple[int, int]:
    """Bytes of one row that are loaded and stored: each matrix once."""
    loaded = sum(extent(node).dtype.itemsize for node in region.inputs if extent(node).rows and extent(node).columns)
    stored = sum(r.extent.dtype.itemsize for r in region.results if r.extent.rows and r.extent.columns)
    return loaded * columns, stored * columns
