"""Trials: inputs of verification, with what the original computes on them in its own dtype and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import CaptureError, VerificationError, first_line
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.carried import ADVICE, copied, lost
from normfuse.graph.program import Program
from normfuse.lower.torch import device_of, fastest, graph_module
from normfuse.rewrite.record import FiringKey
from normfuse.verification.inputs import draws, excerpt, least
from normfuse.verification.numerics import (
    EXACT,
    RATIO,
    Mismatch,
    Verification,
    compare,
    max_abs_error,
    nothing_compared,
    relative_error,
    rounding,
)
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

_AT_ONE_SIZE = 2
"""Trials of a model whose sizes are all fixed: other values show no more than the first other values do."""

MOST = 64
"""Trials at most, however few numbers each gives."""


@dataclass
class Trials:
    """What a candidate is compared with. More are drawn where few numbers leave it open."""

    captured: Program
    run: Run
    """The original on leaves that it must not change."""
    source: Iterator[Leaves]
    inputs: list[Leaves] = field(default_factory=list[Leaves])
    reference64: list[Leaves] = field(default_factory=list[Leaves])
    original: list[Leaves] = field(default_factory=list[Leaves])
    whole: list[Leaves] = field(default_factory=list[Leaves])
    whole_original: list[Leaves] = field(default_factory=list[Leaves])
    """Compared in the model's own dtype: the example, where a part of it stands among `inputs`, and very small ones."""
    exhausted: bool = field(default=False, kw_only=True)
    """The model takes no other inputs."""
    _sensitivity: list[float] | None = None

    def draw(self, count: int) -> None:
        """Add trials. Raises `VerificationError` if the captured program does not run where the model does."""
        new = list(islice(self.source, count))
        self.exhausted = len(new) < count
        self.original += [self.run(leaves) for leaves in new]
        self.reference64 += _certain(lambda: run_float64(self.captured, new)) if new else []
        self.inputs += new

    def judge(self, error64: float, candidate: RunAll, limit64: float = EXACT) -> Verification:
        """Compare a candidate with the original."""
        verdict = self._settled(lambda: self._compare(self.original, candidate(self.inputs), error64, limit64))
        if not verdict or not self.whole:
            return verdict
        try:
            got = candidate(self.whole)
            differences = relative_error(got, self.whole_original)
        except Mismatch as mismatch:
            return replace(verdict, equivalent=False, reason=f"on the whole example, {mismatch}")
        if any(d > u for d, u in zip(differences, self.allowed(), strict=True)):
            self._settle_the_whole()
            return self.judge(error64, candidate, limit64)
        return replace(verdict, max_abs_error=max(verdict.max_abs_error, max_abs_error(got, self.whole_original)))

    def allowed(self) -> list[float]:
        """How far two results may be apart that are each as good as they may be: one unit and `RATIO` units.

        The unit is that of the smaller trials; what is further apart is measured in float64 before it is judged.
        """
        theirs = relative_error(self.original, self.reference64)
        return [(1 + RATIO) * max(pair) for pair in zip(theirs, rounding(self.original[0]), strict=True)]

    def _settle_the_whole(self) -> None:
        """The example becomes a trial like the others."""
        self.reference64 += _certain(lambda: run_float64(self.captured, self.whole))
        self.inputs += self.whole
        self.original += self.whole_original
        self.whole, self.whole_original = [], []

    def judge_capture(self, captured: RunAll) -> Verification:
        """Is the model as close to the float64 reference as the captured program, which that reference was made from?"""
        verdict = self._settled(lambda: self._compare(captured(self.inputs), self.original, 0.0, EXACT))
        if not verdict or not self.whole:
            return verdict
        try:
            differences = relative_error(captured(self.whole), self.whole_original)
        except Mismatch as mismatch:
            return replace(verdict, equivalent=False, reason=f"on the whole example, {mismatch}")
        if any(d > u for d, u in zip(differences, self.allowed(), strict=True)):
            self._settle_the_whole()
            return self.judge_capture(captured)
        return verdict

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
        return len(self.inputs) > count

    def _may_widen(self) -> bool:
        return not self.exhausted and len(self.inputs) < MOST and min(_numbers(self.original), default=ENOUGH) < ENOUGH

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

    def forget_small(self) -> None:
        """No sequence of one and no empty batch: what a model of somebody else's does with them is its own business."""
        kept = [i for i, leaves in enumerate(self.whole) if _size(leaves) >= _size(self.inputs[0])]
        self.whole, self.whole_original = [self.whole[i] for i in kept], [self.whole_original[i] for i in kept]

    def notes(self) -> tuple[str, ...]:
        """What every trial had in common."""
        if len(self.inputs) < 2:
            return ("compared on the example alone",)
        names = [leaf.name for place, leaf in enumerate(self.captured.signature.leaves) if self._never_varied(place)]
        return tuple(f"the input {name!r} was never varied" for name in names)

    def _never_varied(self, place: int) -> bool:
        example, *others = [leaves[place] for leaves in self.inputs]
        return isinstance(example, Tensor) and example.numel() > 0 and all(_same_values(example, other) for other in others)


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


def make_trials(
    captured: Program, original: Run, example: Leaves, count: int, as_given: Callable[[], Leaves] | None = None
) -> Trials:
    """Draw inputs and run the original on them, in its own dtype and (its captured program) in float64.

    `as_given` is the original on the example as the user gave it, objects and all: what is compared for the example.

    A sequence of one and an empty batch, where the model takes them and the captured program does the same, are allowed
    from then on: torch assumes "at least 2" of every free size, but seldom relies on it.
    Raises `NothingCompared` if that gives no number, another `VerificationError` if capture itself has changed the function.
    """
    trials = _trials(captured, original, example, count, as_given)
    for names, leaves in least(captured.signature, example):
        _try_few(trials, names, leaves)
    return trials


def _trials(
    captured: Program, original: Run, example: Leaves, count: int, as_given: Callable[[], Leaves] | None
) -> Trials:
    outcomes: dict[int, Leaves] = {}
    tried: list[Leaves] = []

    def accepts(leaves: Leaves) -> bool:
        try:
            captured.signature.check(leaves)
            outcomes[id(leaves)] = original(cloned(leaves))
        except Exception:
            return False
        tried.append(leaves)  # so that its id stays its own
        return True

    def run(leaves: Leaves) -> Leaves:
        if leaves is example and as_given is not None and id(leaves) not in outcomes:
            outcomes[id(leaves)] = as_given()
        known = outcomes.get(id(leaves))
        return known if known is not None else original(cloned(leaves))

    part = excerpt(captured.signature, example)
    first = part if part is not None and accepts(part) else example
    if not any(isinstance(size, str) for leaf in captured.signature.leaves for size in leaf.sizes):
        count = min(count, _AT_ONE_SIZE)
    trials = Trials(captured, run, draws(captured.signature, first, accepts))
    if first is not example:
        trials.whole, trials.whole_original = [example], [run(example)]
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


def _try_few(trials: Trials, names: set[str], leaves: Leaves) -> None:
    signature = trials.captured.signature
    few = min((given.shape[axis] for given, leaf in zip(leaves, signature.leaves, strict=True)
               for axis, name in enumerate(leaf.sizes) if name in names), default=0)  # fmt: skip
    known = {name: signature.ranges.get(name, (few + 1, 2**62)) for name in names}
    if any(low != few + 1 for low, _ in known.values()):
        return  # allowed already, or forbidden by whoever captured the model
    try:
        wanted = trials.run(leaves)
        differences = relative_error(run_native(trials.captured, [leaves]), [wanted])
    except Exception:
        return  # the model's own limit, or the captured program's
    if any(d > u for d, u in zip(differences, trials.allowed(), strict=True)):
        return
    lower = {name: (few, high) for name, (_, high) in known.items()}
    trials.captured.signature = replace(signature, ranges={**signature.ranges, **lower})
    trials.whole.append(leaves)
    trials.whole_original.append(wanted)


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


def run_as_given(model: nn.Module, args: Any, kwargs: Any) -> Callable[[], Leaves]:
    """The user's own model on copies of the user's own objects.

    Raises `CaptureError` if it does not run, `VerificationError` if its outputs lose state.
    """
    from torch.utils import _pytree as pytree

    def run() -> Leaves:
        try:
            given, named = copied((tuple(args), dict(kwargs or {})))
            with torch.no_grad():
                result = model(*given, **named)
        except Exception as error:
            why = f"{type(model).__name__} does not run on the example: {type(error).__name__} {first_line(error)}"
            raise CaptureError(f"{why} -- check that model(*args, **kwargs) runs with these example inputs") from error
        if why := lost(result, "output"):
            raise VerificationError(f"outputs lose state when they are taken apart: {why}: {ADVICE}")
        return list(pytree.tree_leaves(result))

    return run


def same_twice(run: Callable[[], Leaves]) -> bool:
    """Does the model give the same twice?"""
    try:
        return max(relative_error([run()], [run()]), default=0.0) < EXACT
    except Mismatch:
        return False


def cloned(leaves: Leaves) -> Leaves:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
