"""The way through: raise, passes, verification with roll-back, bake."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial

from normfuse.analysis.zero_mean import mark_zero_mean
from normfuse.errors import NormfuseError, VerificationError
from normfuse.graph.program import Program
from normfuse.lower.torch import device_of, torch_target
from normfuse.ops.tracing import TRACING
from normfuse.pipeline.budget import too_large
from normfuse.pipeline.check import check64
from normfuse.progress import say
from normfuse.recognise import RULES
from normfuse.rewrite import Rule
from normfuse.rewrite.driver import RuleError, run_passes
from normfuse.rewrite.record import FiringKey, Log, Refusal
from normfuse.verification.bisect import WrongBefore, settle, to_blame
from normfuse.verification.numerics import Verification
from normfuse.verification.trials import Trials, run_native
from normfuse.weights.bake import bake
from normfuse.weights.ledger import settled_buffers
from normfuse.weights.program import WeightProgram


@dataclass
class Result:
    """What the pipeline hands on: the program before bake, after it, and the books."""

    unbaked: Program
    baked: Program
    ledger: dict[str, WeightProgram]
    log: Log
    raised: Log
    verification: Verification | None
    rolled_back: list[Refusal] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    unlowered: frozenset[FiringKey] = frozenset()
    """Firings of lowering rules that are wrong, so that later lowerings leave them out."""


class Pipeline:
    """One optimization of one captured program."""

    def __init__(
        self, captured: Program, rules: Sequence[Rule], *, named: bool, seconds: dict[str, float] | None = None
    ) -> None:
        self.captured = captured
        self.rules = rules
        self.named = named
        self.seconds = seconds if seconds is not None else {}
        self.not_raised: frozenset[FiringKey] = frozenset()
        self.unlowered: frozenset[FiringKey] = frozenset()
        self.rolled_back: list[Refusal] = []
        self.oversized: dict[FiringKey, Refusal] = {}

    @contextlib.contextmanager
    def timed(self, stage: str) -> Generator[None]:
        say(stage)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def raise_(self, log: Log | None = None) -> tuple[Program, Log]:
        while True:
            books = log or Log(excluded=self.not_raised)
            try:
                with TRACING, self.timed("raise"):
                    program = self.captured.copy()
                    return program, run_passes(program, RULES, books)
            except RuleError as bug:
                if log is not None:
                    raise
                key = to_blame(books, bug)
                self.not_raised |= {key}
                self.rolled_back.append(Refusal(key[0], books.sites[key], f"rolled back, {bug}"))

    def rewrite(self, raised: Program, log: Log) -> Program:
        """The passes, less what makes the model too large where nobody asked for it by name; `log` must be new."""
        with TRACING, self.timed("passes"):
            while True:
                tried = copy.deepcopy(log)
                tried.excluded |= self.oversized.keys()
                program = raised.copy()
                try:
                    run_passes(program, self.rules, tried, named=self.named)
                except RuleError:
                    vars(log).update(vars(tried))  # who asks which firing failed looks there
                    raise
                whole = not self.named and log.limit is None
                found = too_large(raised, self.rules, program, tried) if whole else {}
                if not found:
                    break
                self.oversized |= found
            tried.refusals |= dict.fromkeys(self.oversized.values())
            vars(log).update(vars(tried))
            mark_zero_mean(program)
            return program

    def run(self, trials: Trials | None, excluded: frozenset[FiringKey] = frozenset()) -> Result:
        """All the way through, without the rewrites `excluded` and those that verification finds to be wrong."""
        raised, raised_log = self.raise_()
        while True:
            try:
                done = settle(partial(self.rewrite, raised), partial(self._wrong, trials=trials), excluded)
                break
            except WrongBefore as before:
                self._mend_raising(before.problem, trials)
                raised, raised_log = self.raise_()
        self.seconds |= done.log.seconds
        baked, ledger, verification = self._made
        rolled_back = [*self.rolled_back, *done.rolled_back]
        return Result(
            done.program, baked, ledger, done.log, raised_log, verification, rolled_back, self.seconds, self.unlowered
        )

    def _mend_raising(self, problem: str, trials: Trials | None) -> None:
        """The raised program is wrong before any pass: a raising is to blame."""
        try:
            done = settle(lambda log: self.raise_(log)[0], partial(self._wrong, trials=trials), self.not_raised)
        except WrongBefore:
            raise VerificationError(
                f"the captured model itself does not compute what the model does: {problem}"
            ) from None
        self.not_raised = done.excluded
        self.rolled_back += done.rolled_back

    # -- verification

    def _wrong(self, unbaked: Program, trials: Trials | None) -> str:
        """What is wrong with the rewritten program (nothing: ""); what was made for the answer is kept in `_made`."""
        problem, error64 = self._check64(unbaked, trials)
        if problem:
            return problem
        unbaked.settled = settled_buffers(self.captured, unbaked)
        with TRACING, self.timed("bake"):
            baked, ledger = bake(unbaked, lambda name: say(f"bake {name}"))
        try:
            with self.timed("verify"):
                verification = self._judge(baked, error64, trials)
        except NormfuseError:
            raise
        except Exception as failure:  # what does not run in the model's own dtype is wrong
            return f"the rewritten program fails: {failure!r:.200}"
        self._made = baked, ledger, verification
        return "" if verification is None or verification.equivalent else verification.reason

    def _check64(self, unbaked: Program, trials: Trials | None) -> tuple[str, float]:
        """In float64 and as it will run, lowered to torch; a wrong lowering rule goes, whatever the passes have done."""
        if trials is None:
            return "", 0.0
        target = torch_target(device_of(unbaked))
        with self.timed("verify"):
            problem, error = check64(target.form(unbaked, Log(excluded=self.unlowered)), trials)
            if not problem or check64(unbaked, trials)[0]:
                return problem, error
            lowered = settle(lambda log: target.form(unbaked, log), lambda f: check64(f, trials)[0], self.unlowered)
            self.unlowered = lowered.excluded
            self.rolled_back += lowered.rolled_back
            return check64(lowered.program, trials)

    def _judge(self, baked: Program, error64: float, trials: Trials | None) -> Verification | None:
        if trials is None:
            return None
        return trials.judge(error64, lambda inputs: run_native(baked, inputs, self.unlowered))


def detached(program: Program) -> Program:
    """The program for the ledger: weights of the model become shapes, so that the model can be freed."""
    kept = {
        name: t if program.origins[name].kind == "constant" or not program.origins[name].persistent else t.to("meta")
        for name, t in program.tensors.items()
    }
    return dataclasses.replace(program, tensors=kept)
