"""Verification: is the result the same function, in float64 and in its own dtype, and if not, which rewrite is to blame."""

from normfuse.verification.numerics import Verification, compare

__all__ = ["Verification", "compare"]
