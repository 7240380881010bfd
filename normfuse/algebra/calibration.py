"""Looking at the values of some nodes while example inputs run through a program, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.float64 import run_float64
from normfuse.graph.node import shape
from normfuse.graph.program import Program
from normfuse.show.terminal import track

Examples = Iterable[Any]
"""Each is what the model is called with: a tuple of arguments, a dict of named ones, a pair of both, or one tensor."""


See = Callable[[fx.Node, Tensor], None]


def observe(program: Program, nodes: Sequence[fx.Node], examples: Sequence[Any], see: See, what: str) -> None:
    """Run the examples and show `see` the value of every node for each of them, with a progress bar on a terminal."""
    part = _part(program, nodes)
    for example in track(examples, what):
        args, kwargs = call_of(example)
        leaves = program.signature.flatten(args, kwargs)
        [values] = run_float64(part, [leaves])
        for node, got in zip(nodes, values, strict=True):
            see(node, got)


def principal_axes(program: Program, axes: Mapping[fx.Node, int], examples: Sequence[Any], what: str) -> Tensor:
    """Eigenvectors (columns, largest first) of the sum of x x^T, x the channels of these nodes, over all examples."""
    width = int(shape(next(iter(axes)))[next(iter(axes.values()))])
    total = torch.zeros(width, width, dtype=torch.float64)

    def see(node: fx.Node, got: Tensor) -> None:
        rows = got.movedim(axes[node], -1).flatten(0, -2).cpu()
        total.add_(rows.T @ rows)

    observe(program, list(axes), examples, see, what)
    return torch.linalg.eigh(total).eigenvectors.flip(-1)


def call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        pair = len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping)
        return (tuple(example[0]), dict(example[1])) if pair else (tuple(example), {})
    return (example,), {}


def _part(program: Program, nodes: Sequence[fx.Node]) -> Program:
    """What of the program these nodes need, with them as its outputs."""
    part = program.copy()
    by_name = {node.name: node for node in part.graph.nodes}
    part.output.args = (tuple(by_name[node.name] for node in nodes),)
    part.drop_dead()
    return part
