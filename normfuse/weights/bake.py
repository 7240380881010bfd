"""Bake: weight programs become weights.

Each computed weight is evaluated in float64 and rounded once to its dtype. The programs stay in the ledger
(`WeightProgram`), so that the same rewrites can be replayed on another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from normfuse.evaluate.rows import Weights
from normfuse.graph.node import aten, is_op, is_weight, op_name
from normfuse.graph.program import Origin, Program
from normfuse.graph.roles import frontier, is_view
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
    with torch.no_grad():
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


def is_move(node: fx.Node) -> bool:
    """A view of one tensor that is no larger than it."""
    return is_view(node) and not is_op(node, aten.expand) and len(node.all_input_nodes) == 1


def settle_moves(program: Program) -> None:
    """Views of weights that rules have made become weights of their own, in place: to move and to round commute."""
    moved: dict[fx.Node, tuple[str, Tensor]] = {}
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            moved[node] = (str(node.target), program.tensors[str(node.target)])
            continue
        source = moved.get(node.all_input_nodes[0]) if node.op == "call_function" and is_move(node) else None
        if source is None:
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: moved[n][1])
        moved[node] = (source[0], node.target(*args, **kwargs))  # type: ignore[operator]
        if node.meta.get("made_by") and any(not is_weight(user) for user in node.users):
            name = _mint(f"{source[0]}_{op_name(node)}", set(program.tensors), "")
            tensor = moved[node][1].contiguous()
            new = _install(program, node, name, tensor, Origin((name,), program.origins[source[0]].kind))
            moved[new] = (name, tensor)
    program.drop_dead()


def _asked_for(node: fx.Node) -> bool:
    """Weights that a pass made or named; other parameter-only computations of the model stay as they are."""
    return any(n.meta.get("made_by") or n.meta.get("bake") for n in behind(node))


def _mint(source: str, taken: set[str], suffix: str = "_baked") -> str:
    """A fresh name next to the source's: a value that differs never takes a name that exists."""
    name, count = f"{source}{suffix}", 1
    while name in taken:
        count += 1
        name = f"{source}{suffix}{count}"
    taken.add(name)
    return name


def _origin(program: Program, name: str, sources: tuple[str, ...]) -> Origin:
    known = [program.origins[s] for s in sources if s in program.origins]
    parameter = any(origin.kind == "parameter" for origin in known)
    return Origin((name,), "parameter" if parameter else "buffer")


def _install(program: Program, node: fx.Node, name: str, tensor: Tensor, origin: Origin) -> fx.Node:
    program.tensors[name] = tensor
    program.origins[name] = origin
    with program.graph.inserting_before(node):
        new = program.graph.create_node("get_attr", name, (), {}, name=name.replace(".", "_"))
    new.meta = {**node.meta, "site_name": name}
    node.replace_all_uses_with(new)
    program.touch()
    return new
