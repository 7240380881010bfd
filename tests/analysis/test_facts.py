"""Facts: worked out once for a version of the graph, anew after any edit, whoever makes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import normfuse
from normfuse.analysis import Facts
from normfuse.graph.node import aten, is_op
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.rewrite import Editor, Exactness, Transform


def linear_of(program: Program) -> fx.Node:
    return next(n for n in program.graph.nodes if is_op(n, aten.linear))


def scaled(edit: Editor, linear: fx.Node) -> None:
    with edit.at(linear):
        edit.replace(linear, edit.rebuild(linear, weight=edit.value(linear.args[1]) * 1.0))  # type: ignore[arg-type]


EDITS: dict[str, Callable[[Editor, fx.Node], object]] = {
    "call": lambda edit, linear: edit.call(aten.neg.default, linear.args[1]),
    "replace": scaled,
    "constant": lambda edit, linear: edit.constant(torch.ones(2), "ones"),
    "refresh": lambda edit, linear: edit.refresh(linear),
    "insert behind": lambda edit, linear: edit.insert_behind(linear, lambda y: y * 1.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_facts_drop_when_the_graph_changes(name: str) -> None:
    asked: list[bool] = []

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        linear = linear_of(program)
        first = facts(weight_only)
        asked.append(facts(weight_only) is first)
        EDITS[name](edit, linear)
        again = facts(weight_only)
        asked.append(again is not first)
        asked.append(again == weight_only(program))

    rule = Transform("edits", exactness=Exactness.ALGEBRAIC, run=run)
    normfuse.optimize(nn.Linear(3, 4).eval(), (torch.randn(2, 3),), passes=[rule], verify=False)
    assert asked and all(asked)
