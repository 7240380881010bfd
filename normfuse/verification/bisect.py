"""Finding the wrong rewrite: the shortest prefix of the firings that is wrong ends with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normfuse.graph.program import Program
from normfuse.progress import say
from normfuse.rewrite.driver import RuleError
from normfuse.rewrite.record import FiringKey, Log, Refusal

Build = Callable[[Log], Program]
"""Runs the passes on a fresh copy of the captured program under the limits of the given log."""


def first_wrong(build: Build, is_right: Callable[[Program], bool], excluded: frozenset[FiringKey], total: int) -> FiringKey:
    """The firing that makes the program wrong, by bisection over prefixes of the firings (about log2(total) runs)."""
    right, wrong = 0, total
    keys: list[FiringKey] = []
    while wrong - right > 1:
        middle = (right + wrong) // 2
        log = Log(limit=middle, excluded=excluded)
        if is_right(build(log)):
            right = middle
        else:
            wrong = middle
            keys = log.permits
    if len(keys) < wrong:
        log = Log(limit=wrong, excluded=excluded)
        build(log)
        keys = log.permits
    return keys[wrong - 1]


@dataclass(frozen=True)
class Settled:
    """A program that nothing is wrong with, its books, and the firings that had to go for it."""

    program: Program
    log: Log
    excluded: frozenset[FiringKey]
    rolled_back: list[Refusal]


class WrongBefore(Exception):
    """The program is wrong without any of the rules that were to be blamed; `problem` says how."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def to_blame(log: Log, bug: RuleError) -> FiringKey:
    """The firing in which a rule has failed. Raises the error itself where it was none."""
    if not log.permits or log.permits[-1][0] != bug.rule:
        raise bug
    return log.permits[-1]


def settle(build: Build, wrong: Callable[[Program], str], excluded: frozenset[FiringKey] = frozenset()) -> Settled:
    """Build until nothing is wrong: of what is wrong the guilty firing is found, excluded from then on, and named.

    `wrong` says what is (nothing: ""). Raises `WrongBefore` where the rules cannot be blamed.
    """
    rolled_back: list[Refusal] = []
    while True:
        log = Log(excluded=excluded)
        try:
            program = build(log)
        except RuleError as bug:  # what cannot be rewritten is left as it was
            key = to_blame(log, bug)
            rolled_back.append(Refusal(key[0], log.sites[key], f"rolled back, {bug}"))
            excluded |= {key}
            continue
        problem = wrong(program)
        if not problem:
            return Settled(program, log, excluded, rolled_back)
        say(f"looking for the wrong rewrite: {problem}")
        if not log.permits or wrong(build(Log(limit=0, excluded=excluded))):
            raise WrongBefore(problem)
        key = first_wrong(build, lambda candidate: not wrong(candidate), excluded, len(log.permits))
        rolled_back.append(Refusal(key[0], log.sites.get(key, key[1]), f"rolled back, {problem}"))
        excluded |= {key}
