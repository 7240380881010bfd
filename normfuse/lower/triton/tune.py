"""How a kernel is launched for rows of a width: which schedule, how large a block, how many rows and warps.

Only the width decides, and the dtype: never the number of rows. So a row's result does not depend on the batch, one
compilation serves every batch, and 40 widths need a dozen compilations. Rows whose width is a multiple of 16 load 16
bytes at once and get a class per power of two; others, which load number by number, share three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

ALIGNED = (128, 256, 512, 1024, 2048, 4096, 8192)
UNALIGNED = (256, 2048, 8192)
SWEEP = 4096
NUMBERS_PER_PROGRAM = 2048
NUMBERS_PER_THREAD = 16
PROGRAMS_PER_MULTIPROCESSOR = 4
INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True)
class Config:
    """What a launch of a kernel is compiled for."""

    schedule: str
    block: int
    rows: int
    warps: int


@lru_cache(maxsize=4096)
def config(columns: int, itemsize: int, *, backward: bool, wave: int = 32) -> Config:
    """The launch for rows of this many columns; `itemsize` is that of what is computed in, `wave` the threads of a warp."""
    largest = ALIGNED[-1] * 4 // itemsize
    fitting = [block for block in (UNALIGNED if columns % 16 else ALIGNED) if columns <= block <= largest]
    if not fitting:
        return Config("sweeps", SWEEP * 4 // itemsize // (2 if backward else 1), 1, 256 // wave)
    block = fitting[0]
    rows = max(1, NUMBERS_PER_PROGRAM * 4 // itemsize // block // (2 if backward else 1))
    return Config("tile", block, rows, min(512, max(128, rows * block // NUMBERS_PER_THREAD)) // wave)


def programs(device: str, index: int | None) -> int:
    """How many programs share the rows of a kernel that sums over them."""
    if device == "cpu":
        return INTERPRETED_PROGRAMS
    import torch

    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(index or 0).multi_processor_count
