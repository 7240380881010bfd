"""Running canonical graphs in float64, several inputs in lockstep, with no more weights alive than needed.

Every floating dtype is promoted, explicit casts included: a float64 run that rounds to float32 on the way proves
nothing. Weight programs are evaluated where they are first read and dropped after that; of a large weight only the rows
that are needed at a time are ever computed, so that no second copy of an embedding table comes into being.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.promote import promote
from normfuse.evaluate.rows import Weights, apply, resolve
from normfuse.graph.program import Program


def run_float64(
    program: Program,
    trials: Sequence[Sequence[Any]],
    tensors: dict[str, Tensor] | None = None,
    *,
    weights: Weights | None = None,
) -> list[list[Any]]:
    """Flat outputs of the program for each trial of flat inputs, every floating value in float64.

    The trials move through the graph together, so that each weight is promoted once. `tensors` stands in for the
    program's own tensors, by the same names; `weights` says how they are read.
    """
    weights = weights or Weights(program, tensors)
    envs: list[dict[fx.Node, Any]] = [{} for _ in trials]
    inputs = [iter(trial) for trial in trials]
    last_read = _last_readers(program)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node in weights.nodes:
                continue
            if node.op == "placeholder":
                for env, given in zip(envs, inputs, strict=True):
                    env[node] = promote(next(given))
                continue
            if node.op == "output":
                return [list(resolve(node.args[0], env, weights)) for env in envs]
            for env, result in zip(envs, apply(node, envs, weights), strict=True):
                env[node] = result
            for dead in last_read.get(node, ()):
                for env in envs:
                    env.pop(dead, None)
    raise AssertionError("a graph without output")


def _last_readers(program: Program) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    frees: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in last.items():
        frees.setdefault(reader, []).append(source)
    return frees
