"""A program in float64 against what the original computes there: the same check for rewritten and for lowered programs."""

from __future__ import annotations

import math

from normfuse.evaluate.float64 import run_float64
from normfuse.evaluate.promote import give_back
from normfuse.graph.program import Program
from normfuse.verification.numerics import EXACT, Mismatch, relative_error
from normfuse.verification.trials import Trials


def check64(program: Program, trials: Trials) -> tuple[str, float]:
    """What is wrong with the program in float64 (nothing: ""), and its error. Its weights may be programs."""
    try:
        error = max(relative_error(run_float64(program, trials.inputs), trials.reference64), default=0.0)
    except Mismatch as mismatch:
        return str(mismatch), math.inf
    except Exception as failure:  # a rewritten graph that does not even run is wrong
        return f"the rewritten program fails: {failure!r:.200}", math.inf
    finally:
        give_back()
    return ("" if error < EXACT else f"the float64 error {error:.1e} is above {EXACT:.0e}"), error
