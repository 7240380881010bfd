"""A cache of analyses over one program. Facts never outlive the graph they were derived from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from normfuse.graph.program import Program

T = TypeVar("T")


class Facts:
    """`facts(analysis)` computes `analysis(program)` once per state of the graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[Callable[..., Any], Any] = {}

    def __call__(self, analysis: Callable[[Program], T]) -> T:
        if analysis not in self._known:
            self._known[analysis] = analysis(self.program)
        return cast(T, self._known[analysis])

    def drop(self) -> None:
        """Forget everything: the graph has changed."""
        self._known.clear()
