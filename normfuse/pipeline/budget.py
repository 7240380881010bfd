"""What rewrites may add to a model's memory: by default 1 % of it, and a quantized weight stays quantized.

A pass that the user asks for by name may take what it needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from normfuse.graph.node import value
from normfuse.graph.program import Program
from normfuse.graph.roles import frontier
from normfuse.rewrite import Rule
from normfuse.rewrite.driver import run_passes
from normfuse.rewrite.record import FiringKey, Log, Refusal
from normfuse.weights.bake import _asked_for

ALLOWED = 1.01
_FLOAT8 = tuple(d for name, d in vars(torch).items() if name.startswith("float8") and isinstance(d, torch.dtype))
_QUANTIZED = (torch.int8, torch.uint8, torch.int16, torch.int32, *_FLOAT8)


@dataclass(frozen=True)
class Held:
    """Bytes of the tensors that a program reads as they are, and of the weights that bake would make."""

    tensors: dict[str, int]
    made: dict[fx.Node, int]

    @property
    def total(self) -> int:
        return sum(self.tensors.values()) + sum(self.made.values())


def held(program: Program) -> Held:
    """What the program will hold once it is baked."""
    wanted = {node for node in frontier(program) if _asked_for(node)}
    found = Held({}, {})
    pending, seen = [program.output], {program.output}
    while pending:
        node = pending.pop()
        if node in wanted:
            found.made[node] = value(node).nbytes
            continue
        if node.op == "get_attr":
            found.tensors[str(node.target)] = program.tensors[str(node.target)].nbytes
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)
    return found


def too_large(raised: Program, rules: Sequence[Rule], program: Program, log: Log) -> dict[FiringKey, Refusal]:
    """Rewrites to leave out of `program`, which the rules have made of `raised`, and why: none where it fits.

    Leaving them out may not be enough: ask again about what the rules make then.
    """
    now = held(program)
    if unpacked := _unpacked(program, now, log):
        return unpacked
    before = held(raised).total
    if now.total <= ALLOWED * before:
        return {}
    name, costs = _largest_step(raised, rules, log.excluded)
    reason = f"the model would be {now.total / before - 1:.1%} larger; passes=[{name!r}] does it all the same"
    found: dict[FiringKey, Refusal] = {}
    left = now.total - ALLOWED * before
    for node, cost in costs:
        found |= {key: _refusal(key, log, reason) for key in _firings(node) if key[0] == name}
        left -= cost
        if left <= 0:
            break
    return found


def _refusal(key: FiringKey, log: Log, reason: str) -> Refusal:
    return Refusal(key[0], log.sites.get(key, key[1]), reason)


def _unpacked(program: Program, now: Held, log: Log) -> dict[FiringKey, Refusal]:
    """Every rewrite that would keep the dequantized weight in the place of the quantized one."""
    found: dict[FiringKey, Refusal] = {}
    for node, size in now.made.items():
        read = [program.tensors[name] for name in _leaves(node)]
        narrow = [t for t in read if t.dtype in _QUANTIZED and t.dim() >= 2]
        times = size / max(1, sum(t.nbytes for t in read))
        if narrow and times > 1:
            kept = str(narrow[0].dtype).removeprefix("torch.")
            for key in _firings(node):
                why = f"the weight stays {kept}: dequantized it takes {times:.1f} times the memory"
                why += f"; passes=[{key[0]!r}] does it all the same"
                found[key] = _refusal(key, log, why)
    return found


def _largest_step(
    raised: Program, rules: Sequence[Rule], excluded: frozenset[FiringKey]
) -> tuple[str, list[tuple[fx.Node, float]]]:
    """The pass that adds most, and its weights by what each adds, the most first."""
    program, log = raised.copy(), Log(excluded=excluded)
    size, most = held(program).total, 0
    step: tuple[str, list[tuple[fx.Node, float]]] = ("", [])
    for rule in rules:
        run_passes(program, [rule], log)
        now = held(program)
        if now.total - size > most:
            most = now.total - size
            step = rule.name, _costs(program, now, rule.name)
        size = now.total
    return step


def _costs(program: Program, now: Held, pass_name: str) -> list[tuple[fx.Node, float]]:
    """What each weight of this pass adds: its size less its share of the tensors that only such weights read."""
    leaves = {node: _leaves(node) for node in now.made}
    readers = Counter(name for names in leaves.values() for name in names)
    found = [
        (node, size - sum(program.tensors[n].nbytes / readers[n] for n in leaves[node] if n not in now.tensors))
        for node, size in now.made.items()
        if any(key[0] == pass_name for key in _firings(node))
    ]
    return sorted((each for each in found if each[1] > 0), key=lambda each: -each[1])


def _cone(node: fx.Node) -> Iterator[fx.Node]:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        yield current
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)


def _leaves(node: fx.Node) -> set[str]:
    return {str(n.target) for n in _cone(node) if n.op == "get_attr"}


def _firings(node: fx.Node) -> set[FiringKey]:
    return {n.meta["firing"] for n in _cone(node) if n.meta.get("firing")}
