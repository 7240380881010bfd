"""A cache of analyses over one program. Facts never outlive the version of the graph that they were derived from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from normfuse.graph.program import Program

T = TypeVar("T")


class Facts:
    """`facts(analysis)` computes `analysis(program)` once per version of the graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._version = program.version
        self._known: dict[Callable[..., Any], Any] = {}

    def __call__(self, analysis: Callable[[Program], T]) -> T:
        if self._version != self.program.version:
            self._known.clear()
            self._version = self.program.version
        if analysis not in self._known:
            self._known[analysis] = analysis(self.program)
        return cast(T, self._known[analysis])
