"""Which weights of a result are still the memory of the model that it was made from, and a result that shares none."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from normfuse.graph.program import Program
from normfuse.pipeline.run import Result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def shared_names(made: Program, captured: Program) -> frozenset[str]:
    """Names of the weights whose memory is that of a weight of `captured`."""
    model = {_storage(t) for t in captured.tensors.values() if t.numel() and t.device.type != "meta"}
    return frozenset(name for name, t in made.tensors.items() if t.numel() and _storage(t) in model)


def unshared(result: Result, names: frozenset[str]) -> Result:
    """The result with copies of these weights, before bake and after it alike: executables are made from both."""
    made: dict[int, Tensor] = {}
    copies = {n: made.setdefault(id(t), t.clone()) for n, t in result.baked.tensors.items() if n in names}

    def own(program: Program) -> Program:
        return dataclasses.replace(program, tensors={n: copies.get(n, t) for n, t in program.tensors.items()})

    return dataclasses.replace(result, baked=own(result.baked), unbaked=own(result.unbaked))
