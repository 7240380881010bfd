"""One norm, softmax or attention of a model, and the kinds there are."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "layer_norm", "rms_norm", "crms_norm", "l2_norm", "batch_norm", "group_norm", "instance_norm", "softmax", "attention",
    "weight_norm", "spectral_norm", "weight_standardization", "rep_batch_norm", "unified_norm", "power_norm", "dyt", "derf",
    "branches", "lora",
)  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """One norm, softmax or attention: what, where, over which axes, with which eps, with which gains, its role, its cost.

    `bytes` and `flop` are those of one call on the example inputs: all that is read and written once, all operations.
    """

    kind: str
    site: str
    axes: tuple[int, ...] = ()
    eps: float | None = None
    affine: str = "none"
    placement: str = "other"
    bytes: int = 0
    flop: int = 0
