"""What a rewrite promises about its result, and the tolerance that follows from the promise."""

from __future__ import annotations

from enum import Enum


class Exactness(Enum):
    """How the rewritten function relates to the original one."""

    BITWISE = "bitwise"
    """The same operations on the same values."""
    ALGEBRAIC = "algebraic"
    """Equal in real arithmetic; differs by rounding alone."""
    APPROXIMATE = "approximate"
    """Another function that is close by measurement."""
    RETRAIN = "retrain"
    """Another function, to be trained."""

    @property
    def exact(self) -> bool:
        return self in (Exactness.BITWISE, Exactness.ALGEBRAIC)
