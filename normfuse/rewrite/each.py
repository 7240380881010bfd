"""Lowering rules that look at one node at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import is_weight
from normfuse.graph.program import Program
from normfuse.rewrite.editor import Editor, Value
from normfuse.rewrite.exactness import Exactness
from normfuse.rewrite.rule import Transform

Replace = Callable[[fx.Node, Editor], Value | None]
"""From a node to what stands for it, or None for a node that the rule leaves alone."""


def computed(program: Program) -> list[fx.Node]:
    """The calls that are made at every run: what is computed from weights alone is evaluated before."""
    return [node for node in program.graph.nodes if node.op == "call_function" and not is_weight(node)]


def each(replace: Replace, exactness: Exactness = Exactness.ALGEBRAIC) -> Transform:
    """The rule, by the name of the function, that sends every computed node through it once."""

    @wraps(replace)
    def run(program: Program, facts: Facts, edit: Editor) -> None:
        for node in computed(program):
            if node._erased:
                continue
            with edit.at(node):
                new = replace(node, edit)
            if new is not None and edit.fire(node):
                edit.replace(node, new)
            elif new is not None:
                edit.remove_dead(new.node)

    return Transform(replace.__name__, run, exactness=exactness)
