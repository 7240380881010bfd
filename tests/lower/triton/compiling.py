"""Compiles kernels in a process that does not interpret them: requests in JSON as the argument, facts in JSON out."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

import normfuse.functional as nf
from normfuse.lower.triton.ahead import MACHINES, compile_ahead, matrix_bytes
from normfuse.lower.triton.launch import RowKernel, row_kernel
from normfuse.lower.triton.region import per_column, rows, scalar
from normfuse.lower.triton.tune import Config

OPTIONS = {"eps": 1e-6, "cast": "last", "scale": 8.0, "correction": 0, "place": "inside"}
COLUMNS, SCALARS = ("weight", "bias", "v", "beta", "alpha"), ("gain", "sink", "shift")


def kernel(name: str, dtype: torch.dtype = torch.bfloat16) -> RowKernel:
    [operator] = [each for each in nf.OPERATORS if each.name == name]
    single = SCALARS if name == "seed_norm" else (*SCALARS, "alpha", "beta")

    def argument(each: str) -> Any:
        return (scalar if each in single else per_column if each in COLUMNS else rows)(each, dtype)

    options = tuple((each, OPTIONS[each]) for each in operator.options)
    arguments = tuple(argument(each) for each in operator.names)
    reference = operator.derived or operator.reference
    return row_kernel(name, reference, arguments, operator.results, options, operator.online)


def facts(name: str, columns: int, target: str, backward: bool, config: list[Any] | None) -> dict[str, Any]:
    made = kernel(name)
    wanted = (True,) * len(made.region.inputs) if backward else None
    given = None if config is None else Config(*config)
    found = compile_ahead(made, columns, target, wanted, config=given)
    region = made.region if wanted is None else made.backward(wanted)
    loaded, stored = matrix_bytes(region, 1)
    block = min(columns, found.config.block)
    little = (found.in_flight(loaded * block), found.needed()) if target in MACHINES else None
    return {**dataclasses.asdict(found), "bytes": (loaded, stored), "little": little}


if __name__ == "__main__":
    print(json.dumps([facts(*request) for request in json.loads(sys.argv[1])]))
