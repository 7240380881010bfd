"""raise_normal_forms:  f(x), f(x)  ->  one f(x)

Exactness: bitwise.
Legal if:  two calls have the same operator and the same arguments, and draw no random numbers.
Leaves alone: everything else.
Reference: common subexpressions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from normfuse.analysis import Facts
from normfuse.analysis.constants import is_random
from normfuse.node import aten, is_op
from normfuse.program import Program
from normfuse.rewrite import Editor, Exactness, Phase, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    known: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if is_random(node) or is_op(node, aten.empty, aten.new_empty, aten.empty_like):
            continue
        key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        first = known.setdefault(key, node)
        if first is not node and edit.permit(node):
            edit.replace(node, first)


def _key(item: Any) -> Any:
    if isinstance(item, tuple | list):
        return tuple(_key(i) for i in item)
    if isinstance(item, dict):
        return tuple((k, _key(v)) for k, v in item.items())
    if isinstance(item, Tensor):
        return id(item)
    return item if isinstance(item, fx.Node) else (type(item).__name__, repr(item))


RULE = Transform("raise_normal_forms", exactness=Exactness.BITWISE, phase=Phase.RAISE, run=run)
