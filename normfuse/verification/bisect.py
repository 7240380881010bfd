"""Finding the wrong rewrite: the shortest prefix of the firings that is wrong ends with it."""

from __future__ import annotations

from collections.abc import Callable

from normfuse.graph.program import Program
from normfuse.rewrite.record import FiringKey, Log

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
