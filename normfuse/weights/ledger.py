"""What a ledger of weight programs asks of another checkpoint before it is replayed on it.

A rewrite may rest on values: a scale was positive, a buffer was found to be the causal mask and is no longer read. Then
another checkpoint must agree, or the same rewrite would give it another function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from normfuse.errors import NormfuseError
from normfuse.graph.program import Program


def settled_buffers(captured: Program, rewritten: Program) -> dict[str, Tensor]:
    """Buffers of the checkpoint that fewer operators read than before, and no weight is computed from.

    What they say is now in the graph itself.
    """
    before, after = _reads(captured), _reads(rewritten)
    made_of = {
        str(n.target)
        for n in rewritten.graph.nodes
        if n.op == "get_attr" and any(user.meta.get("made_by") or user.meta.get("bake") for user in n.users)
    }
    found: dict[str, Tensor] = {}
    for name, count in before.items():
        origin = captured.origins[name]
        if origin.kind == "buffer" and origin.persistent and after[name] < count and name not in made_of:
            found |= {known_as: captured.tensors[name] for known_as in origin.names}
    return found


def _reads(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "get_attr" for _ in n.users)


def check_checkpoint(program: Program, state_dict: Mapping[str, Tensor]) -> None:
    """Raise `NormfuseError` for a checkpoint that what was decided for the first one does not hold for."""
    for name, tensor in program.settled.items():
        given = state_dict.get(name)
        if given is not None and not (given.shape == tensor.shape and torch.equal(given.to(tensor), tensor)):
            raise NormfuseError(f"{name!r} differs in the checkpoint, and its values decided about rewrites: optimize it")
    for origin in program.origins.values():
        tied = [state_dict[n] for n in origin.names if n in state_dict]
        if any(not _same(tied[0], other) for other in tied[1:]):
            names = " and ".join(map(repr, origin.names))
            raise NormfuseError(f"{names} are tied in the model and differ in the checkpoint")


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b)))


def check_weight(name: str, weight: Tensor, sources: Mapping[str, Tensor]) -> None:
    """A condition on values (a scale must be positive) is part of its weight program, and gives NaN where it fails."""
    if bool(weight.isnan().any()) and not any(bool(source.isnan().any()) for source in sources.values()):
        raise NormfuseError(
            f"{name!r} has no value in this checkpoint: a number whose sign the rewrite rests on has another one in "
            f"{', '.join(sources)}: optimize it"
        )
