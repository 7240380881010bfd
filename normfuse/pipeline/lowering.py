"""From weight programs down to what runs: the form is checked in float64, the executable on the trials in its own dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from normfuse.errors import LoweringError, VerificationError
from normfuse.graph.program import Program
from normfuse.lower.choose import refusing, target_of
from normfuse.lower.target import Run, Target, settled
from normfuse.pipeline.check import check64
from normfuse.rewrite.record import FiringKey, Log, Refusal
from normfuse.verification.bisect import WrongBefore, settle
from normfuse.verification.numerics import Verification
from normfuse.verification.trials import Trials, cloned


@dataclass(frozen=True)
class Lowered:
    """A form whose weights are evaluated, its error in float64 (None: nobody looked), and the books of its rules."""

    form: Program
    error64: float | None
    log: Log
    rolled_back: list[Refusal] = field(default_factory=list[Refusal])


def lower(
    program: Program, target: Target, trials: Trials | None, excluded: frozenset[FiringKey] = frozenset()
) -> Lowered:
    """The program in the target's operators; of its rules, each firing that changes the function is rolled back and named.

    Raises `VerificationError` where the program does not compute what the original does before any rule has fired.
    """
    if trials is None:
        log = Log(excluded=excluded)
        return Lowered(settled(target.form(program, log)), None, log)
    errors = [0.0]

    def wrong(form: Program) -> str:
        problem, errors[0] = check64(form, trials)
        return problem

    try:
        done = settle(lambda log: target.form(program, log), wrong, excluded)
    except WrongBefore as before:
        raise VerificationError(
            f"the program does not compute what the model does before it is lowered to {target.name}: {before.problem}"
        ) from None
    return Lowered(settled(done.program), errors[0], done.log, done.rolled_back)


def ready(
    program: Program, backend: str, trials: Trials | None, excluded: frozenset[FiringKey] = frozenset()
) -> tuple[Run, Lowered]:
    """The program made ready to run, and how it was lowered.

    Raises `LoweringError` for an executable that does not compute on the trials what the original does.
    """
    target = target_of(backend, program)
    lowered = lower(program, target, trials, excluded)
    assert target.executable is not None
    with refusing(f"backend {backend!r} cannot take this model"):
        run = target.executable(lowered.form)
    with refusing(f"backend {backend!r} cannot be called here"):
        verdict = trials and judged(partial(_called, run), trials, lowered.error64 or 0.0)
    if verdict is not None and not verdict:
        raise LoweringError(f"backend {backend!r} does not compute what the model does: {verdict.reason}")
    return run, lowered


def judged(run_all: Callable[[Sequence[list[Any]]], list[list[Any]]], trials: Trials, error64: float) -> Verification:
    """An executable on the trials in its own dtype, in units of the original's error."""
    return trials.judge(error64, run_all)


def _called(run: Run, inputs: Sequence[list[Any]]) -> list[list[Any]]:
    with torch.no_grad():
        return [list(run(*cloned(leaves))) for leaves in inputs]
