"""Bake: weight programs become weights.

Each computed weight is evaluated in float64 and rounded once to its dtype. The programs stay in the ledger
(`WeightProgram`), so that the same rewrites can be replayed on another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from normfuse.evaluate.promote import default_float64
from normfuse.evaluate.rows import Weights
from normfuse.graph.program import Origin, Program
from normfuse.graph.roles import frontier
from normfuse.graph.walk import behind
from normfuse.weights.program import WeightProgram, _evaluate, sources_of

Tick = Callable[[str], None]


def bake(program: Program, tick: Tick | None = None) -> tuple[Program, dict[str, WeightProgram]]:
    """A copy of the program whose computed weights are tensors, and the ledger of how each came about."""
    baked = program.copy()
    ledger: dict[str, WeightProgram] = {}
    weights = Weights(program)  # the unbaked graph: a weight that feeds another is not rounded in between
    originals = {n.name: n for n in program.graph.nodes}
    taken = {name for origin in program.origins.values() for name in origin.names} | set(program.tensors)
    with torch.no_grad(), default_float64():
        for node in [n for n in frontier(baked) if _asked_for(n)]:
            source = originals[node.name]
            sources = sources_of(source)  # there, too: in the copy, a weight that it reads may be baked already
            name = _mint(sources[0] if sources else node.name, taken)
            tensor = _evaluate(weights, source)
            ledger[name] = WeightProgram(name, sources, tensor.dtype, program, source)
            _install(baked, node, name, tensor, _origin(baked, name, sources))
            if tick:
                tick(name)
    baked.drop_dead()
    return baked, ledger


def _asked_for(node: fx.Node) -> bool:
    """Weights that a pass made or named; other parameter-only computations of the model stay as they are."""
    return any(n.meta.get("made_by") or n.meta.get("bake") for n in behind(node))


def _mint(source: str, taken: set[str]) -> str:
    """A fresh name next to the source's: a value that differs never takes a name that exists."""
    name, count = f"{source}_baked", 1
    while name in taken:
        count += 1
        name = f"{source}_baked{count}"
    taken.add(name)
    return name


def _origin(program: Program, name: str, sources: tuple[str, ...]) -> Origin:
    known = [program.origins[s] for s in sources if s in program.origins]
    parameter = any(origin.kind == "parameter" for origin in known)
    return Origin((name,), "parameter" if parameter else "buffer")


def _install(program: Program, node: fx.Node, name: str, tensor: Tensor, origin: Origin) -> None:
    program.tensors[name] = tensor
    program.origins[name] = origin
    with program.graph.inserting_before(node):
        new = program.graph.create_node("get_attr", name, (), {}, name=name.replace(".", "_"))
    new.meta = {**node.meta, "site_name": name}
    node.replace_all_uses_with(new)
