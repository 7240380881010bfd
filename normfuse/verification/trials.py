"""Trials: inputs of verification, with what the original computes on them in its own dtype and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import VerificationError
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.program import Program
from normfuse.lower.torch import device_of, fastest, graph_module
from normfuse.rewrite.record import FiringKey
from normfuse.verification.inputs import draws
from normfuse.verification.numerics import EXACT, Verification, compare

Leaves = list[Any]
Run = Callable[[Leaves], Leaves]
RunAll = Callable[[Sequence[Leaves]], list[Leaves]]

ENOUGH = 128
"""Numbers of an output that an error ratio above its limit must be seen on before it is believed.

The ratio of two equal errors over n independent numbers is above 2 once in 10^7 at n = 64, and one time in five at n = 2;
the numbers of one run are not independent of each other, hence twice that.
"""

MOST = 64
"""Trials at most, however few numbers each gives."""


@dataclass
class Trials:
    """What a candidate is compared with. More are drawn where few numbers leave it open."""

    captured: Program
    run: Run
    source: Iterator[Leaves]
    inputs: list[Leaves] = field(default_factory=list[Leaves])
    reference64: list[Leaves] = field(default_factory=list[Leaves])
    original: list[Leaves] = field(default_factory=list[Leaves])

    def draw(self, count: int) -> None:
        """Add trials. Raises `VerificationError` if the captured program does not run where the model does."""
        new = list(islice(self.source, count))
        self.original += [self.run(cloned(leaves)) for leaves in new]
        self.reference64 += _certain(lambda: run_float64(self.captured, new))
        self.inputs += new

    def judge(self, error64: float, candidate: RunAll, limit64: float = EXACT) -> Verification:
        """Compare a candidate with the original."""
        return self._settled(lambda: self._compare(self.original, candidate(self.inputs), error64, limit64))

    def judge_capture(self, captured: RunAll) -> Verification:
        """Is the model as close to the float64 reference as the captured program, which that reference was made from?"""
        return self._settled(lambda: self._compare(captured(self.inputs), self.original, 0.0, EXACT))

    def _compare(self, original: list[Leaves], candidate: list[Leaves], error64: float, limit64: float) -> Verification:
        return compare(
            reference64=self.reference64, error64=error64, original=original, candidate=candidate, limit64=limit64
        )

    def _settled(self, measure: Callable[[], Verification]) -> Verification:
        """An error ratio above its limit is measured again on more numbers before it is believed."""
        while True:
            verdict = measure()
            if not verdict.by_rounding_alone or not self.widen():
                return verdict

    def widen(self) -> bool:
        """Twice the trials where an output has fewer numbers than are enough; were there any to add?"""
        count = len(self.inputs)
        if count >= MOST or min(_numbers(self.original), default=ENOUGH) >= ENOUGH:
            return False
        self.draw(min(count, MOST - count))
        return True


def _numbers(outputs: Sequence[Leaves]) -> list[int]:
    """How many numbers there are of each floating output, over the trials."""
    floating = [[o.numel() for o in trial if isinstance(o, Tensor) and o.is_floating_point()] for trial in outputs]
    return [sum(counts) for counts in zip(*floating, strict=True)]


def make_trials(captured: Program, original: Run, example: Leaves, count: int) -> Trials:
    """Draw inputs and run the original on them, in its own dtype and (its captured program) in float64.

    Raises `VerificationError` if capture itself has changed the function.
    """

    def accepts(leaves: Leaves) -> bool:
        try:
            original(cloned(leaves))
            captured.signature._check(leaves)
        except Exception:
            return False
        return True

    trials = Trials(captured, original, draws(captured.signature, example, accepts))
    trials.draw(count)
    verdict = trials.judge_capture(lambda inputs: _certain(lambda: run_native(captured, inputs)))
    if not verdict:
        raise VerificationError(
            f"the captured program does not compute what the model does ({verdict.reason}): the model may depend on "
            "Python state that changes between calls"
        )
    return trials


def _certain(run: Callable[[], list[Leaves]]) -> list[Leaves]:
    try:
        return run()
    except Exception as failure:
        raise VerificationError(
            f"the captured program does not run on inputs the model takes: {failure!r:.300}"
        ) from failure


def run_native(
    program: Program, trials: Sequence[Leaves], excluded: frozenset[FiringKey] = frozenset()
) -> list[Leaves]:
    """Flat outputs in the program's own dtypes, lowered as an optimized model would be on that device."""
    module = graph_module(fastest(program, device_of(program), excluded))
    with torch.no_grad():
        return [list(module(*cloned(leaves))) for leaves in trials]


def original_run(model: nn.Module, captured: Program) -> Run:
    """The user's own model on flat leaves."""
    from torch.utils import _pytree as pytree

    def run(leaves: Leaves) -> Leaves:
        args, kwargs = pytree.tree_unflatten(leaves, captured.signature.in_spec)
        with torch.no_grad():
            return list(pytree.tree_leaves(model(*args, **kwargs)))

    return run


def cloned(leaves: Leaves) -> Leaves:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
