"""Conditions on sizes: the branches that a model's own Python took while it was captured.

A capture holds one side of `if width % patch: x = pad(x)`. Other sizes that take the same side run as the model does;
the rest must be refused, since the graph would compute something else for them without a word. The exporter lists what
it was asked about sizes (`shape_env.guards`), its own questions about strides among it: where a question was asked
tells them apart.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from normfuse.errors import CaptureError

_TORCH = Path(torch.__file__).parent
_PYTHON_OF_MODELS = ("nn", "functional.py")
"""Parts of torch whose Python chooses operators, as a model's own does; the rest asks about strides and layouts."""
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max": max, "min": min, "abs": abs}
_SYNTAX = (
    ast.Expression, ast.Compare, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Constant, ast.Name, ast.Call, ast.Load,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """What must hold of the free sizes: a Python expression over their names, and where the model asked."""

    text: str
    where: str = ""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(n.id for n in ast.walk(self._tree) if isinstance(n, ast.Name)) - frozenset(_FUNCTIONS)

    @cached_property
    def _tree(self) -> ast.Expression:
        """Raises `CaptureError` for anything but arithmetic: a condition may come from a file."""
        try:
            tree = ast.parse(self.text, mode="eval")
        except SyntaxError:
            raise CaptureError(f"a condition on sizes is not readable: {self.text!r}") from None
        for node in ast.walk(tree):
            if not isinstance(node, _SYNTAX) or (isinstance(node, ast.Call) and not _is_known(node.func)):
                raise CaptureError(f"a condition on sizes is more than arithmetic: {self.text!r}")
        return tree

    @cached_property
    def _code(self) -> CodeType:
        return compile(self._tree, "<condition>", "eval")

    def holds(self, sizes: Mapping[str, int]) -> bool:
        return bool(eval(self._code, {"__builtins__": {}, **_FUNCTIONS}, dict(sizes)))

    def told(self, names: Mapping[str, str]) -> str:
        """The condition in the caller's words: each size by the name given for it."""

        class Renamed(ast.NodeTransformer):
            def visit_Name(self, node: ast.Name) -> ast.Name:
                return ast.Name(names.get(node.id, node.id), node.ctx)

        return ast.unparse(Renamed().visit(copy.deepcopy(self._tree)))


def _is_known(function: ast.expr) -> bool:
    return isinstance(function, ast.Name) and function.id in _FUNCTIONS


def unmet(
    conditions: tuple[Condition, ...], sizes: Mapping[str, int], names: Callable[[], Mapping[str, str]] = dict
) -> Iterator[str]:
    """What does not hold of the sizes, in words, each size by its name for the caller."""
    for condition in conditions:
        if condition.names <= sizes.keys() and not condition.holds(sizes):
            where = f" ({condition.where})" if condition.where else ""
            yield f"the model branches on its input sizes{where}, and was captured where {condition.told(names())}"
