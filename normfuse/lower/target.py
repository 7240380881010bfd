"""A target is a rule set on the same engine: rules that lower a program, and what runs the result.

The rules run on weight programs, before bake, so that each weight is rounded once. What they make, the *form*, computes
in float64 what the program does; a rule that breaks this is found as a wrong pass is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.tracing import TRACING
from normfuse.rewrite import Rule, run_passes
from normfuse.rewrite.record import Log
from normfuse.weights.bake import bake, is_move, settle_moves

Run = Callable[..., Sequence[Any]]
"""From flat leaves to flat leaves."""


@dataclass(frozen=True)
class Target:
    """What programs are lowered to: `rules` run in order, `executable` makes a baked form run, `choice` is for the rules."""

    name: str
    rules: tuple[Rule, ...]
    executable: Callable[[Program], Run] | None = None
    choice: Any = None

    def form(self, program: Program, log: Log | None = None) -> Program:
        """A copy of the program in the target's operators, its weights programs still."""
        with TRACING:
            form = program.copy()
            mark_weights(form)
            run_passes(form, self.rules, log, choice=self.choice)
        return form


def settled(form: Program) -> Program:
    """The form with its weight programs evaluated, each rounded once."""
    baked, _ = bake(form)
    settle_moves(baked)
    return baked


def mark_weights(program: Program) -> None:
    """Tell rules what `bake` will evaluate, as if it had, and views of weights: to them these are weights."""
    fixed = weight_only(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in fixed:
            continue
        made = node.meta.get("made_by") or node.meta.get("bake")
        if made or any(n.meta.get("constant") for n in node.all_input_nodes) or is_move(node):
            node.meta["constant"] = True
