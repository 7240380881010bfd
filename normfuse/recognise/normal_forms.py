"""raise_normal_forms:  f(x), f(x)  ->  one f(x);  (e v) / sum(e)  ->  (e / sum(e)) v;  linear(x, v) s  ->  linear(x, v s)

Exactness: algebraic.
Legal if:  two calls have the same operator and the same arguments, and draw no random numbers; the sum runs over the axis
           that the product sums over.
Leaves alone: everything else.
Reference: common subexpressions; a division by one number for each row passes through a product.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from normfuse.analysis import Facts
from normfuse.graph.node import argument, aten, is_op, rank
from normfuse.graph.program import Program
from normfuse.graph.roles import is_random, weight_only
from normfuse.graph.walk import behind
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
        if first is not node:
            edit.replace(node, first)
    for node in list(program.graph.nodes):
        if is_op(node, aten.div):
            _divide_first(node, edit)
        elif is_op(node, aten.mul):
            _scale_weight(node, facts, edit)


def _divide_first(node: fx.Node, edit: Editor) -> None:
    product, total = node.args[:2]
    if not isinstance(product, fx.Node) or not is_op(product, aten.matmul, aten.bmm) or len(product.users) != 1:
        return
    weights, values = product.args[:2]
    if not isinstance(total, fx.Node) or not is_op(total, aten.sum) or total.args[0] is not weights:
        return
    if not argument(total, "keepdim") or argument(total, "dim") not in ([-1], [rank(total) - 1]):
        return
    with edit.at(node):
        shares = edit.call(aten.div.Tensor, weights, total)
        edit.replace(node, edit.call(product.target, shares, values))


def _scale_weight(node: fx.Node, facts: Facts, edit: Editor) -> None:
    """linear(x, v) * s(v): the scale of a weight by its own norm belongs to the weight."""
    weights = facts(weight_only)
    for projected, scale in (node.args[:2], node.args[1::-1]):
        if not isinstance(projected, fx.Node) or not is_op(projected, aten.linear) or scale not in weights:
            continue
        weight = argument(projected, "weight")
        fits = rank(scale) == 1 and weight.op == "get_attr" and len(projected.users) == 1
        if fits and argument(projected, "bias") is None and weight in behind(scale):
            with edit.at(node):
                scaled = edit.value(weight) * edit.value(scale).unsqueeze(1)
                edit.replace(node, edit.rebuild(projected, weight=scaled))
            return


def _key(item: Any) -> Any:
    if isinstance(item, tuple | list):
        return tuple(_key(i) for i in item)
    if isinstance(item, dict):
        return tuple((k, _key(v)) for k, v in item.items())
    if isinstance(item, Tensor):
        return id(item)
    return item if isinstance(item, fx.Node) else (type(item).__name__, repr(item))


RULE = Transform("raise_normal_forms", exactness=Exactness.ALGEBRAIC, phase=Phase.RAISE, run=run)
