"""Lowering rules that are slightly wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from normfuse.graph.node import value
from normfuse.lower.onnx.rules import outputs
from normfuse.rewrite import Editor, Transform
from normfuse.rewrite.editor import anchor_name


def mutant(rule: Transform, factor: float) -> Transform:
    """The rule with what it makes at its first site (the same one in every run) multiplied by the factor."""
    first: list[str] = []

    def is_first(old: fx.Node) -> bool:
        if not first:
            first.append(anchor_name(old))
        return anchor_name(old) == first[0]

    def run(program: Any, facts: Any, edit: Editor) -> None:
        right, copied = edit.replace, outputs._copied

        def wrong(old: fx.Node, new: Any) -> fx.Node:
            if not value(old).dtype.is_floating_point or not is_first(old):
                return right(old, new)
            with edit.at(old):
                return right(old, edit.value(new) * factor)

        def wrong_copy(item: fx.Node, output: fx.Node, editor: Editor) -> fx.Node:
            made = copied(item, output, editor)
            if is_first(item):
                with editor.at(output):
                    made = (editor.value(made) * factor).node
            return made

        edit.replace = wrong  # type: ignore[method-assign]
        outputs._copied = wrong_copy
        try:
            rule.run(program, facts, edit)
        finally:
            outputs._copied = copied

    return replace(rule, run=run)
