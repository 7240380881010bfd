"""One new parameter as a program over the original ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.evaluate.rows import Weights
from normfuse.graph.node import shape, value
from normfuse.graph.program import Program
from normfuse.graph.walk import tensors_behind
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class WeightProgram:
    """A new parameter as a function of original ones: `node` in `program`, of this dtype, from these sources."""

    name: str
    sources: tuple[str, ...]
    dtype: torch.dtype
    program: Program
    node: fx.Node

    def evaluate(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weight from the given tensors (by original name), in float64, rounded once."""
        with torch.no_grad():
            return _evaluate(Weights(self.program, dict(tensors) if tensors is not None else None), self.node)

    def __str__(self) -> str:
        return f"{self.name} = {_text(self.node)}"


def evaluate(program: Program, node: fx.Node) -> Tensor:
    """The value of one weight program, in float64, rounded once."""
    with torch.no_grad():
        return _evaluate(Weights(program), node)


def _evaluate(weights: Weights, node: fx.Node) -> Tensor:
    """Evaluate by blocks of rows and round each once; nothing of float64 outlives its block."""
    wanted = value(node).dtype
    if is_a(node, Trait.PERMUTE) and node.all_input_nodes == [node.args[0]]:  # rounded first: that takes half the memory
        turned = node.target(_evaluate(weights, node.args[0]), *node.args[1:])  # type: ignore[operator, arg-type]
        return turned.contiguous()  # type: ignore[no-any-return]
    out: Tensor | None = None
    for rows, block in weights.blocks(node):
        if rows == slice(None):
            return block.to(wanted).contiguous().clone() if block.dtype == wanted else block.to(wanted).contiguous()
        if out is None:
            out = torch.empty([int(s) for s in shape(node)], dtype=wanted, device=block.device)
        out[rows] = block.to(wanted)
    assert out is not None
    return out


def sources_of(node: fx.Node) -> tuple[str, ...]:
    """Names of the tensors the node reads, the one that gives it its size first."""
    found = {str(n.target): _size(n) for n in tensors_behind(node)}
    wanted = _size(node)
    return tuple(sorted(found, key=lambda name: (found[name] != wanted, -found[name])))


def _size(node: fx.Node) -> int:
    total = 1
    for size in shape(node):
        total *= int(size)
    return total


def _text(node: fx.Node) -> str:
    """The program as an expression a person can read."""
    if node.op == "get_attr":
        return str(node.target)
    parts = [_text(a) if isinstance(a, fx.Node) else repr(a) for a in node.args]
    parts += [f"{k}={_text(v) if isinstance(v, fx.Node) else v!r}" for k, v in node.kwargs.items()]
    return f"{str(node.target).removeprefix('aten.').partition('.')[0]}({', '.join(parts)})"
