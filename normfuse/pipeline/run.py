"""The way through: raise, passes, verification with roll-back, bake."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from normfuse.analysis.zero_mean import mark_zero_mean
from normfuse.errors import VerificationError
from normfuse.evaluate.float64 import run_float64
from normfuse.evaluate.promote import give_back
from normfuse.graph.program import Program
from normfuse.ops.tracing import TRACING
from normfuse.progress import say
from normfuse.recognise import RULES
from normfuse.rewrite import Rule
from normfuse.rewrite.driver import run_passes
from normfuse.rewrite.record import FiringKey, Log, Refusal
from normfuse.verification.bisect import first_wrong
from normfuse.verification.numerics import EXACT, Mismatch, Verification, relative_error
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

    @contextlib.contextmanager
    def timed(self, stage: str) -> Generator[None]:
        say(stage)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def raise_(self, log: Log | None = None) -> tuple[Program, Log]:
        with TRACING, self.timed("raise"):
            program = self.captured.copy()
            return program, run_passes(program, RULES, log or Log(excluded=self.not_raised))

    def rewrite(self, raised: Program, log: Log) -> Program:
        with TRACING:
            program = raised.copy()
            run_passes(program, self.rules, log, named=self.named)
            mark_zero_mean(program)
            return program

    def run(self, trials: Trials | None, excluded: frozenset[FiringKey] = frozenset()) -> Result:
        """All the way through, without the rewrites `excluded` and those that verification finds to be wrong."""
        raised, raised_log = self.raise_()
        rolled_back: list[Refusal] = []
        while True:
            log = Log(excluded=excluded)
            with self.timed("passes"):
                unbaked = self.rewrite(raised, log)
            with self.timed("verify"):
                problem, error64 = self._check64(unbaked, trials)
            if not problem:
                with TRACING, self.timed("bake"):
                    unbaked.settled = settled_buffers(self.captured, unbaked)
                    baked, ledger = bake(unbaked, lambda name: say(f"bake {name}"))
                with self.timed("verify"):
                    verification = self._judge(baked, error64, trials)
                if verification is None or verification.equivalent:
                    break
                problem = verification.reason
            say(f"looking for the wrong rewrite: {problem}")
            with self.timed("verify"):
                key = self._guilty(raised, log, raised_log, excluded, trials, problem)
            sites = raised_log.sites | log.sites
            rolled_back.append(Refusal(key[0], sites.get(key, key[1]), f"rolled back, {problem}"))
            if key in raised_log.permits:
                self.not_raised |= {key}
                raised, raised_log = self.raise_()
            else:
                excluded |= {key}
        self.seconds |= log.seconds
        return Result(unbaked, baked, ledger, log, raised_log, verification, rolled_back, self.seconds)

    # -- verification

    def _check64(self, unbaked: Program, trials: Trials | None) -> tuple[str, float]:
        """What is wrong with the rewritten program in float64 (nothing: ""), and its error."""
        if trials is None:
            return "", 0.0
        try:
            error = max(relative_error(run_float64(unbaked, trials.inputs), trials.reference64), default=0.0)
        except Mismatch as mismatch:
            return str(mismatch), math.inf
        except Exception as failure:  # a rewritten graph that does not even run is wrong
            return f"the rewritten program fails: {failure!r:.200}", math.inf
        finally:
            give_back()
        return ("" if error < EXACT else f"the float64 error {error:.1e} is above {EXACT:.0e}"), error

    def _judge(self, baked: Program, error64: float, trials: Trials | None) -> Verification | None:
        if trials is None:
            return None
        return trials.judge(error64, lambda inputs: run_native(baked, inputs))

    def _guilty(
        self,
        raised: Program,
        log: Log,
        raised_log: Log,
        excluded: frozenset[FiringKey],
        trials: Trials | None,
        problem: str,
    ) -> FiringKey:
        """The rewrite to blame: a pass's, or, where the raised program is wrong before any pass, a raising's."""

        def is_right(program: Program) -> bool:
            wrong, error64 = self._check64(program, trials)
            if wrong:
                return False
            verdict = self._judge(bake(program)[0], error64, trials)
            return verdict is None or verdict.equivalent

        if is_right(self.rewrite(raised, Log(limit=0, excluded=excluded))):
            return first_wrong(lambda limited: self.rewrite(raised, limited), is_right, excluded, len(log.permits))
        if not raised_log.permits or not is_right(self.captured.copy()):
            raise VerificationError(f"the captured model itself does not compute what the model does: {problem}")
        return first_wrong(lambda limited: self.raise_(limited)[0], is_right, self.not_raised, len(raised_log.permits))


def detached(program: Program) -> Program:
    """The program for the ledger: weights of the model become shapes, so that the model can be freed."""
    kept = {
        name: t if program.origins[name].kind == "constant" or not program.origins[name].persistent else t.to("meta")
        for name, t in program.tensors.items()
    }
    return dataclasses.replace(program, tensors=kept)
