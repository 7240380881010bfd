"""The questions that a model's own code asked about sizes while it was captured, as conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfuse.graph.conditions import _PYTHON_OF_MODELS, _TORCH, Condition


def conditions_of(shape_env: Any, ranges: Mapping[str, tuple[int, int]]) -> tuple[Condition, ...]:
    """What the model's own code asked about the sizes of its inputs, as far as the ranges leave it open.

    Raises `CaptureError` for a question that cannot be asked again at a call; sizes must then be fixed.
    """
    found: dict[str, Condition] = {}
    for guard in getattr(shape_env, "guards", ()):
        expression = shape_env.simplify(guard.expr)
        symbols = {str(symbol) for symbol in expression.free_symbols}
        if not symbols or not symbols <= set(ranges) or not is_of_the_model(guard) or _is_implied(expression, ranges):
            continue
        condition = Condition(_printed(expression), place_of(guard))
        if condition.names:  # read now, not at the first call
            found.setdefault(condition.text, condition)
    return tuple(found.values())


def frame_of(guard: Any) -> Any:
    """The innermost Python frame, outside the arithmetic of sizes, in which the question was asked."""
    return getattr(getattr(guard, "sloc", None), "framework_loc", None)


def is_of_the_model(guard: Any) -> bool:
    frame = frame_of(guard)
    path = Path(getattr(frame, "filename", "") or "")
    if not path.is_relative_to(_TORCH):
        return frame is not None
    return path.relative_to(_TORCH).parts[0] in _PYTHON_OF_MODELS


def place_of(guard: Any) -> str:
    frame = frame_of(guard)
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _is_implied(expression: Any, ranges: Mapping[str, tuple[int, int]]) -> bool:
    import sympy
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    known = {}
    for symbol in expression.free_symbols:
        low, high = ranges[str(symbol)]
        known[symbol] = ValueRanges(low, int_oo if high >= 2**62 else high)
    try:
        bounds = bound_sympy(expression, known)
    except Exception:  # what cannot be bounded is not implied
        return False
    return bounds.is_singleton() and bounds.lower == sympy.true


def _printed(expression: Any) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expression))
