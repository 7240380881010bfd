"""All near misses."""
from .corpus import NearMiss
NEAR_MISSES: tuple[NearMiss, ...] = ()
