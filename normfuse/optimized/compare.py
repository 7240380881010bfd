"""A candidate against a reference: by its weight programs where it has them."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.capture.export import capture
from normfuse.errors import VerificationError
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.program import Program
from normfuse.optimized.module import Optimized
from normfuse.pipeline.subject import Model
from normfuse.verification.numerics import EXACT, relative_error
from normfuse.verification.trials import Trials


def candidate64(candidate: Model, captured: Program, drawn: Trials, args: Any, kwargs: Any) -> tuple[Any, float]:
    """The candidate in float64, and how far it may be off there."""
    if isinstance(candidate, Optimized) and candidate.ledger is not None:
        tensors = _named_tensors(captured, candidate.ledger)
        if tensors is not None:
            return run_float64(candidate.ledger, drawn.inputs, tensors), EXACT
    program = candidate.program if isinstance(candidate, Optimized) else capture(candidate, args, kwargs)
    if len(program.signature.leaves) != len(captured.signature.leaves):
        raise VerificationError("the two models take different inputs")
    # Weights that were rounded after a change are off by a rounding each: as much as the original's own error, or what
    # that rounding does to the original, which the caller asks for where this is not enough.
    shared = _same_weights(program, captured)
    own_error = max(relative_error(drawn.original, drawn.reference64), default=0.0)
    return run_float64(program, drawn.inputs), EXACT if shared else max(EXACT, own_error)


def _named_tensors(captured: Program, ledger: Program) -> dict[str, torch.Tensor] | None:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in ledger.tensors.items():
        if tensor.device.type != "meta":
            found[name] = tensor
            continue
        given = captured.tensors.get(name)
        if given is None or given.shape != tensor.shape:
            return None
        found[name] = given
    return found


def _same_weights(program: Program, captured: Program) -> bool:
    known = captured.tensors.values()
    return all(any(t.shape == k.shape and torch.equal(t, k) for k in known) for t in program.tensors.values())
