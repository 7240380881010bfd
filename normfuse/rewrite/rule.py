"""A rule is a value: a frozen record of plain functions, an exactness, and the docstring of its file.

`Rewrite` looks at one place at a time (pattern, legal, worth, replace). `Transform` looks at the whole program (run).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import readers
from normfuse.graph.program import Program
from normfuse.rewrite.editor import Editor
from normfuse.rewrite.exactness import Exactness
from normfuse.rewrite.pattern import Pattern


class Phase(IntEnum):
    """Passes run in this order."""

    RAISE = 0
    REPARAMETERIZE = 1
    FUSE = 2


class Refused(Exception):
    """Carries a reason out of `legal`; the driver turns it into a Refusal."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class Match:
    """One way in which a pattern fits: `m.x` is what the variable `x` is bound to, `m.linear` the node of that call."""

    def __init__(self, root: fx.Node, bindings: dict[str, Any], nodes: dict[str, fx.Node], facts: Facts) -> None:
        self.root = root
        self.bindings = bindings
        self.nodes = nodes
        self.facts = facts
        self.program = facts.program

    def __getattr__(self, name: str) -> Any:
        bindings = self.__dict__.get("bindings", {})
        if name in bindings:
            return bindings[name]
        nodes = self.__dict__.get("nodes", {})
        if name in nodes:
            return nodes[name]
        raise AttributeError(name)

    def require(self, condition: bool, reason: str, node: fx.Node | None = None) -> None:
        """Refuse this match, with this reason, unless the condition holds."""
        if not condition:
            raise Refused(reason, node)

    def readers(self, node: fx.Node | None = None) -> tuple[fx.Node, ...]:
        return readers(self.root if node is None else node)


@dataclass(frozen=True)
class Rule:
    """What every pass has."""

    name: str
    exactness: Exactness = field(kw_only=True)
    phase: Phase = field(default=Phase.REPARAMETERIZE, kw_only=True)
    on_request: bool = field(default=False, kw_only=True)
    """True: runs only when asked for by name."""

    @cached_property
    def doc(self) -> str:
        """The docstring of the file the rule is written in."""
        module = sys.modules.get(self._home().__module__)
        return inspect.cleandoc(module.__doc__ or "") if module else ""

    def _home(self) -> Any:
        raise AssertionError("a Rule is either a Rewrite or a Transform")


@dataclass(frozen=True)
class Rewrite(Rule):
    """pattern: what to look for; legal: is it correct here; worth: does it pay here; replace: the new expression."""

    pattern: Callable[..., Any]
    legal: Callable[[Match], None]
    replace: Callable[[Match, Editor], Any]
    worth: Callable[[Match], None] | None = field(default=None, kw_only=True)
    before: str = field(default="", kw_only=True)
    after: str = field(default="", kw_only=True)

    @cached_property
    def drawn(self) -> Pattern:
        return Pattern.of(self.pattern)

    def _home(self) -> Any:
        return self.pattern


@dataclass(frozen=True)
class Transform(Rule):
    """A pass over the whole program: `run(program, facts, edit)` asks `edit.permit`, edits, and tells `edit.fired`."""

    run: Callable[[Program, Facts, Editor], None]

    def _home(self) -> Any:
        return self.run
