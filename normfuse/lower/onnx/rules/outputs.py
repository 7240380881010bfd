"""Outputs as ONNX wants them: each is a value of its own."""

from __future__ import annotations

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import aten, is_weight
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform


def own_outputs(program: Program, facts: Facts, edit: Editor) -> None:
    """An input, a weight or an output told twice goes through a copy."""
    output = program.output
    seen: set[fx.Node] = set()
    items: list[object] = []
    for item in output.args[0]:  # type: ignore[union-attr]
        if isinstance(item, fx.Node):
            again = item in seen or item.op == "placeholder" or is_weight(item)
            item = _copied(item, output, edit) if again and edit.fire(item) else item
            seen.add(item)
        items.append(item)
    output.args = (tuple(items),)  # type: ignore[assignment]


def _copied(item: fx.Node, output: fx.Node, edit: Editor) -> fx.Node:
    """Not through the editor, which makes no node twice and a copy of a weight a weight."""
    with output.graph.inserting_before(output):
        copied = output.graph.call_function(aten.clone.default, (item,))
    copied.meta = {"val": edit.infer(copied)}
    return copied


RULE = Transform("own_outputs", own_outputs, exactness=Exactness.BITWISE)
