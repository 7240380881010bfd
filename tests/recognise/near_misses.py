"""All near misses."""

from __future__ import annotations

from . import near_misses_further, near_misses_norm, near_misses_other, near_misses_softmax
from .corpus import NearMiss

NEAR_MISSES: tuple[NearMiss, ...] = (
    *near_misses_norm.NEAR_MISSES,
    *near_misses_softmax.NEAR_MISSES,
    *near_misses_other.NEAR_MISSES,
    *near_misses_further.NEAR_MISSES,
)
