"""Weight programs on another checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from normfuse.errors import NormfuseError
from normfuse.weights.ledger import check_checkpoint, check_weight
from normfuse.weights.program import WeightProgram


def replay(ledger: Mapping[str, WeightProgram], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new parameters for another checkpoint of the same model.

    `ledger` is `report.weights`; `state_dict` maps the model's own qualified names to tensors (tied names may stand for
    each other). Raises `NormfuseError` naming the first tensor that is missing, has another shape, or has values that
    the rewrites do not hold for.
    """
    for program in {id(weight.program): weight.program for weight in ledger.values()}.values():
        check_checkpoint(program, state_dict)
    return {name: _replayed(weight, checkpoint_tensors(weight, state_dict)) for name, weight in ledger.items()}


def _replayed(weight: WeightProgram, tensors: dict[str, Tensor]) -> Tensor:
    found = weight.evaluate(tensors)
    check_weight(weight.name, found, tensors)
    return found


def checkpoint_tensors(weight: WeightProgram, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the weight is computed from, out of a checkpoint that must have it in the same shapes."""
    found: dict[str, Tensor] = {}
    for source in weight.sources:
        origin = weight.program.origins[source]
        if origin.kind == "constant" or not origin.persistent:
            found[source] = weight.program.tensors[source]
            continue
        name = next((n for n in origin.names if n in state_dict), None)
        if name is None:
            raise NormfuseError(f"the checkpoint has no {source!r}, which {weight.name!r} is computed from")
        expected = weight.program.tensors[source].shape
        if state_dict[name].shape != expected:
            raise NormfuseError(f"{name!r} has shape {list(state_dict[name].shape)} in the checkpoint, not {list(expected)}")
        found[source] = state_dict[name].detach()
    return found
