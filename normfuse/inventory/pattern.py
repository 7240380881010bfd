"""One norm, softmax or attention of a model, and the kinds there are."""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.ops import operators
from normfuse.recognise.rows.further import KINDS as FURTHER

_WITHOUT_OPERATOR = (
    "weight_norm", "spectral_norm", "weight_standardization", "rep_batch_norm", "unified_norm", "power_norm", "branches",
    "lora", *FURTHER,
)  # fmt: skip


def kinds() -> tuple[str, ...]:
    """All kinds there are: those of the known functions, and those of what is no operator."""
    own = [k for record in operators() for k in ([record.kind] if isinstance(record.kind, str) else record.kinds)]
    return tuple(dict.fromkeys([*own, *_WITHOUT_OPERATOR]))


@dataclass(frozen=True)
class Pattern:
    """One norm, softmax or attention: what, where, over which axes, with which eps, with which gains, its role, its cost.

    `eps_place`: eps stands `inside` the root or `outside` of it, is the least value of the root (`clamp`) or of what
    stands under it (`floor`); empty for what has no eps.
    `bytes` and `flop` are those of one call on the example inputs: all that is read and written once, all operations.
    """

    kind: str
    site: str
    axes: tuple[int, ...] = ()
    eps: float | None = None
    eps_place: str = ""
    affine: str = "none"
    placement: str = "other"
    bytes: int = 0
    flop: int = 0
