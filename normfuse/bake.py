"""Bake: weight programs become weights.

Each computed weight is evaluated in float64 and rounded once to its dtype. The programs stay in the ledger
(`WeightProgram`), so that the same rewrites can be replayed on another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.analysis.constants import frontier
from normfuse.errors import NormfuseError
from normfuse.evaluate import Weights, default_float64
from normfuse.ledger import check_checkpoint, check_weight
from normfuse.node import shape, value
from normfuse.program import Origin, Program

Tick = Callable[[str], None]


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
        with torch.no_grad(), default_float64():
            return _evaluate(Weights(self.program, dict(tensors) if tensors is not None else None), self.node)

    def __str__(self) -> str:
        return f"{self.name} = {_text(self.node)}"


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
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current.meta.get("made_by") or current.meta.get("bake"):
            return True
        stack.extend(n for n in current.all_input_nodes if n not in seen)
        seen.update(current.all_input_nodes)
    return False


def evaluate(program: Program, node: fx.Node) -> Tensor:
    """The value of one weight program, in float64, rounded once."""
    with torch.no_grad(), default_float64():
        return _evaluate(Weights(program), node)


def _evaluate(weights: Weights, node: fx.Node) -> Tensor:
    """Evaluate by blocks of rows and round each once; nothing of float64 outlives its block."""
    wanted = value(node).dtype
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
    found: dict[str, int] = {}
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            found[str(current.target)] = _size(current)
        stack.extend(reversed(current.all_input_nodes))
    wanted = _size(node)
    return tuple(sorted(found, key=lambda name: (found[name] != wanted, -found[name])))


def _size(node: fx.Node) -> int:
    total = 1
    for size in shape(node):
        total *= int(size)
    return total


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


def _text(node: fx.Node) -> str:
    """The program as an expression a person can read."""
    if node.op == "get_attr":
        return str(node.target)
    parts = [_text(a) if isinstance(a, fx.Node) else repr(a) for a in node.args]
    parts += [f"{k}={_text(v) if isinstance(v, fx.Node) else v!r}" for k, v in node.kwargs.items()]
    return f"{str(node.target).removeprefix('aten.').partition('.')[0]}({', '.join(parts)})"


def replay(ledger: Mapping[str, WeightProgram], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new parameters for another checkpoint of the same model.

    `ledger` is `report.weights`; `state_dict` maps the model's own qualified names to tensors (tied names may stand for
    each other). Raises `NormfuseError` naming the first tensor that is missing, has another shape, or has values that
    the rewrites do not hold for.
    """
    for program in {id(weight.program): weight.program for weight in ledger.values()}.values():
        check_checkpoint(program, state_dict)
    return {name: _replayed(weight, checkpoint_tensors(weight, state_dict)) for name, weight in ledger.items()}


def _replayed(weight: WeightProgram, tensors: dict[str, Tensor]) -> Tensor:
    found = weight.evaluate(tensors)
    check_weight(weight.name, found, tensors)
    return found


def checkpoint_tensors(weight: WeightProgram, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the weight is computed from, out of a checkpoint that must have it in the same shapes."""
    found: dict[str, Tensor] = {}
    for source in weight.sources:
        origin = weight.program.origins[source]
        if origin.kind == "constant" or not origin.persistent:
            found[source] = weight.program.tensors[source]
            continue
        name = next((n for n in origin.names if n in state_dict), None)
        if name is None:
            raise NormfuseError(f"the checkpoint has no {source!r}, which {weight.name!r} is computed from")
        expected = weight.program.tensors[source].shape
        if state_dict[name].shape != expected:
            raise NormfuseError(f"{name!r} has shape {list(state_dict[name].shape)} in the checkpoint, not {list(expected)}")
        found[source] = state_dict[name].detach()
    return found
