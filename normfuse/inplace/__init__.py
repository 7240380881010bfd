"""Carrying rewrites of parameters back into the user's own modules: what to write where, and writing it or nothing."""

from normfuse.inplace.plan import Plan, Problem, plan_write_back
from normfuse.inplace.write import Written, write_back

__all__ = ["Plan", "Problem", "Written", "plan_write_back", "write_back"]
