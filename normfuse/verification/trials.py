"""Trials: inputs of verification, with what the original computes on them in its own dtype and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import VerificationError
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.program import Program
from normfuse.lower.torch import fastest, graph_module
from normfuse.verification.inputs import draws
from normfuse.verification.numerics import EXACT, Verification, compare, nothing_compared
from normfuse.verification.sensitivity import sensitivity

Leaves = list[Any]


class NothingCompared(VerificationError):
    """The trials give no number to compare."""


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
    _sensitivity: list[float] | None = None

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
            reference64=self.reference64,
            error64=error64,
            original=original,
            candidate=candidate,
            limit64=limit64,
            sensitivity=None if self._may_widen() else self.sensitivity,
        )

    def _settled(self, measure: Callable[[], Verification]) -> Verification:
        """An error ratio above its limit is measured again on more numbers before it is believed."""
        while True:
            verdict = measure()
            if not verdict.by_rounding_alone or not self.widen():
                return replace(verdict, notes=self.notes())

    def widen(self) -> bool:
        """Twice the trials where an output has fewer numbers than are enough; were there any to add?"""
        if not self._may_widen():
            return False
        count = len(self.inputs)
        self.draw(min(count, MOST - count))
        return True

    def _may_widen(self) -> bool:
        return len(self.inputs) < MOST and min(_numbers(self.original), default=ENOUGH) < ENOUGH

    def sensitivity(self) -> list[float]:
        """What rounding the weights does to each output: measured once, on the smallest trials that are enough."""
        if self._sensitivity is None:
            few = self._smallest()
            inputs, wanted = [self.inputs[i] for i in few], [self.reference64[i] for i in few]
            self._sensitivity = sensitivity(self.captured, inputs, wanted)
        return self._sensitivity

    def _smallest(self) -> list[int]:
        order = sorted(range(len(self.inputs)), key=lambda i: _size(self.inputs[i]))
        for count in range(1, len(order)):
            if min(_numbers([self.original[i] for i in order[:count]]), default=ENOUGH) >= ENOUGH:
                return order[:count]
        return order

    def notes(self) -> tuple[str, ...]:
        """What every trial had in common."""
        if len(self.inputs) < 2:
            return ("compared on the example alone",)
        names = [leaf.name for place, leaf in enumerate(self.captured.signature.leaves) if self._never_varied(place)]
        return tuple(f"the input {name!r} was never varied" for name in names)

    def _never_varied(self, place: int) -> bool:
        example, *others = [leaves[place] for leaves in self.inputs]
        return isinstance(example, Tensor) and all(_same_values(example, other) for other in others)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Where both have numbers: a part of the example is the example again."""
    common = tuple(slice(min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
    one, other = one[common], other[common]
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _size(leaves: Leaves) -> int:
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))


def _numbers(outputs: Sequence[Leaves]) -> list[int]:
    """How many numbers there are of each floating output, over the trials."""
    floating = [[o.numel() for o in trial if isinstance(o, Tensor) and o.is_floating_point()] for trial in outputs]
    return [sum(counts) for counts in zip(*floating, strict=True)]


def make_trials(captured: Program, original: Run, example: Leaves, count: int) -> Trials:
    """Draw inputs and run the original on them, in its own dtype and (its captured program) in float64.

    Raises `NothingCompared` if that gives no number, another `VerificationError` if capture itself has changed the function.
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
    if nothing := nothing_compared(trials.reference64):
        raise NothingCompared(f"{nothing}: pass an example on which the model gives numbers, or verify=False")
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


def run_native(program: Program, trials: Sequence[Leaves]) -> list[Leaves]:
    """Flat outputs in the program's own dtypes, lowered as an optimized model would be on that device."""
    device = next((t.device for t in program.tensors.values()), torch.device("cpu"))
    module = graph_module(fastest(program, device))
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
