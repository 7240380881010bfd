"""remove_inference_noops:  dropout(x, training=False), x * 1, x + 0, expand to the same shape  ->  x

Exactness: bitwise.
Legal if:  the result has the shape and dtype of x and equals it for every x.
Leaves alone: dropout that is active at inference (F.dropout with training left at True).
Reference: torch.nn.functional.dropout.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import argument, arguments, aten, dtype, is_op, op_name, same_size, shape
from normfuse.graph.program import Program
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite import Editor, Exactness, Phase, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in list(program.graph.nodes):
        if is_a(node, Trait.DROPOUT) and argument(node, "train") is not False:
            edit.refuse(node, f"{op_name(node)} is active at inference: it was called with training=True")
            continue
        same = _what_it_is(node)
        if same is not None and edit.permit(node):
            edit.fired(node, before=op_name(node), after="nothing")
            edit.replace(node, same)


def _what_it_is(node: fx.Node) -> fx.Node | None:
    """The input that the node returns unchanged, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source: fx.Node = node.args[0]
    if is_a(node, Trait.DROPOUT):
        return source
    if not shape(node) or dtype(node) != dtype(source) or not _same_shape(source, node):
        return None
    given = arguments(node)
    if is_a(node, Trait.RESHAPE | Trait.EXPAND) or (is_op(node, aten.slice) and _takes_all(given)):
        return source
    if is_op(node, aten.add, aten.sub) and _is_number(given["other"], 0):
        return source
    if is_op(node, aten.mul, aten.div) and _is_number(given["other"], 1) and given.get("rounding_mode") is None:
        return source
    return None


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    first, second = shape(a), shape(b)
    return len(first) == len(second) and all(same_size(x, y) for x, y in zip(first, second, strict=True))


def _takes_all(given: dict[str, Any]) -> bool:
    return given["step"] == 1 and given["start"] in (None, 0)


def _is_number(item: Any, number: int) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool) and item == number


RULE = Transform("remove_inference_noops", exactness=Exactness.BITWISE, phase=Phase.RAISE, run=run)
