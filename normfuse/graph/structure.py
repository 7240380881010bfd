"""The invariants of a canonical graph, checked after every pass."""

from __future__ import annotations

from torch import Tensor, fx

from normfuse.graph.node import value
from normfuse.graph.program import Program
from normfuse.graph.spelling import is_canonical


class StructureError(AssertionError):
    """A pass left a graph that is not canonical: a bug in that pass."""


def check_structure(program: Program, *, after: str) -> None:
    """Inputs first, every name known, every value described, one output, nothing mutated.

    Raises `StructureError` with ten nodes round the offender.
    """
    seen: set[fx.Node] = set()
    inputs_over = False
    for node in program.graph.nodes:
        if node.op == "placeholder" and inputs_over:
            _fail(node, after, "an input stands behind the first computation")
        inputs_over = inputs_over or node.op == "call_function"
        for source in node.all_input_nodes:
            if source not in seen:
                _fail(node, after, f"reads {source.name} before it is computed")
        if node.op == "get_attr" and str(node.target) not in program.tensors:
            _fail(node, after, f"names a tensor {node.target!r} that the program does not have")
        if node.op == "get_attr" and tuple(value(node).shape) != tuple(program.tensors[str(node.target)].shape):
            _fail(node, after, "differs in shape from the tensor it names")
        if node.op == "call_function" and "val" not in node.meta:
            _fail(node, after, "has no known value")
        if node.op == "call_function" and not is_canonical(node):
            _fail(node, after, f"is not in its canonical spelling ({node.target}; see graph/spelling.py)")
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            _fail(node, after, f"is a {node.op}, which canonical graphs do not have")
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            _fail(node, after, "writes to one of its arguments")
        seen.add(node)
    if len(program.placeholders) != len(program.signature.leaves):
        _fail(program.output, after, "the inputs are not those of the signature")


def _fail(node: fx.Node, after: str, why: str) -> None:
    raise StructureError(f"after {after}: {node.name} {why}\n{around(node)}")


def around(node: fx.Node, count: int = 5) -> str:
    """The node with its neighbours in the graph, marked."""
    nodes = list(node.graph.nodes)
    place = nodes.index(node)
    lines = []
    for other in nodes[max(0, place - count) : place + count + 1]:
        val = value(other)
        shape = f"  {list(val.shape)}" if isinstance(val, Tensor) else ""
        lines.append(f"{'>>' if other is node else '  '} {other.format_node() or other.op}{shape}")
    return "\n".join(lines)
