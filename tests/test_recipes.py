"""The recipes of CONTRIBUTING.md, followed: a pass, a lowering rule, a fact. (A known function: tests/ops.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import normfuse
from normfuse.analysis import Facts
from normfuse.capture.export import capture
from normfuse.graph.node import aten, is_op
from normfuse.graph.program import Program
from normfuse.lower import torch as torch_lowering
from normfuse.rewrite import Editor, Exactness, Log, Match, Rewrite, Transform, Value, each, op

X = (torch.randn(5, 6) + 0.5,)


class Doubled(nn.Module):
    """A square beside a linear, for a pass to rewrite and a rule to lower."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square() + x.sin()


# -- a pass --------------------------------------------------------------------------------------------------------------


def pattern(x: Value) -> object:
    return op.square(x)


def legal(m: Match) -> None:
    m.require(len(m.readers()) == 1, "the square is read more than once")


def replace(m: Match, new: Editor) -> object:
    return new.op("mul", m.x, m.x)


SQUARE_TO_PRODUCT = Rewrite("square_to_product", pattern, legal, replace, exactness=Exactness.BITWISE)


def test_a_pass_is_one_value() -> None:
    model = Doubled().eval()
    optimized = normfuse.optimize(model, X, passes=[SQUARE_TO_PRODUCT])
    assert optimized.report.fired == {"square_to_product": 1}
    assert optimized.report.verification
    assert not any(is_op(node, aten.square) for node in optimized.program.graph.nodes)
    torch.testing.assert_close(optimized(*X), model(*X), rtol=1e-6, atol=1e-6)


def test_a_pass_that_is_wrong_goes() -> None:
    def wrong(m: Match, new: Editor) -> object:
        return new.op("mul", new.op("mul", m.x, m.x), 1 + 1e-6)

    rule = Rewrite("square_to_product", pattern, legal, wrong, exactness=Exactness.BITWISE)
    optimized = normfuse.optimize(Doubled().eval(), X, passes=[rule])
    assert [refusal.pass_name for refusal in optimized.report.rolled_back] == ["square_to_product"]
    assert not optimized.report.fired


# -- a lowering rule -----------------------------------------------------------------------------------------------------


def sine_as_cosine(node: fx.Node, edit: Editor) -> Value | None:
    """sin(x) = cos(x - pi / 2)"""
    if not is_op(node, aten.sin):
        return None
    return edit.call(aten.cos.default, edit.call(aten.sub.Tensor, node.args[0], torch.pi / 2))


def test_a_lowering_rule_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_lowering, "TABLE", (each(sine_as_cosine), *torch_lowering.TABLE))
    model = Doubled().eval()
    optimized = normfuse.optimize(model, X)
    assert optimized.report.verification and not optimized.report.rolled_back
    assert any(is_op(node, aten.cos) for node in optimized.graph_module.graph.nodes)
    torch.testing.assert_close(optimized(*X), model(*X), rtol=1e-5, atol=1e-5)


# -- a fact --------------------------------------------------------------------------------------------------------------


def sines(program: Program) -> tuple[fx.Node, ...]:
    return tuple(node for node in program.graph.nodes if is_op(node, aten.sin))


def test_a_fact_is_one_function_and_lasts_as_long_as_the_graph() -> None:
    program = capture(Doubled().eval(), X)
    facts, asked = Facts(program), []

    def counted(given: Program) -> int:
        asked.append(given)
        return len(sines(given))

    assert (facts(counted), facts(counted), len(asked)) == (1, 1, 1)
    edit = Editor(program, "test", Log())
    [node] = sines(program)
    with edit.at(node):
        edit.replace(node, edit.call(aten.cos.default, node.args[0]))
    program.drop_dead()
    assert facts(counted) == 0 and len(asked) == 2


def test_a_pass_asks_for_facts() -> None:
    seen: list[int] = []

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        seen.append(len(facts(sines)))

    normfuse.optimize(Doubled().eval(), X, passes=[Transform("looks", run, exactness=Exactness.BITWISE)], verify=False)
    assert seen == [1]
