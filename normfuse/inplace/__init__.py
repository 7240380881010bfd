"""Carrying rewrites of parameters back into the user's own modules: what to write where, and writing it or nothing."""

from normfuse.inplace.optimize import Done, optimize_modules

__all__ = ["Done", "optimize_modules"]
