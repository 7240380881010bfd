"""What each node's value depends on: sizes alone, fixed tensors, parameters, or the inputs."""

from __future__ import annotations

from enum import Enum

import torch
from torch import fx

from normfuse.analysis.constants import is_random
from normfuse.node import aten, is_op, value
from normfuse.program import Program

_VALUES_IGNORED = (
    aten.new_ones, aten.new_zeros, aten.new_empty, aten.new_full, aten.zeros_like, aten.ones_like, aten.empty_like,
    aten.full_like, aten.sym_size, aten.sym_numel, aten.sym_stride,
)  # fmt: skip


class Role(Enum):
    """SIZE: no tensor. FIXED: literals and buffers. WEIGHT: parameters too. ACTIVATION: the inputs too."""

    SIZE = 0
    FIXED = 1
    WEIGHT = 2
    ACTIVATION = 3


class Roles:
    """`roles(node)`: worked out once for a graph, and for new nodes from their operands."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._latents: frozenset[fx.Node] = frozenset()
        self._known: dict[fx.Node, Role] = {}
        self._work_out()
        self._latents = _latents(program, self._known)
        if self._latents:
            self._work_out()

    def _work_out(self) -> None:
        self._known = {}
        for node in self.program.graph.nodes:
            self._known[node] = self._of(node)

    def __call__(self, node: fx.Node) -> Role:
        if node not in self._known:
            self._known[node] = self._of(node)
        return self._known[node]

    def _of(self, node: fx.Node) -> Role:
        if node.op == "placeholder" or node in self._latents:
            return Role.ACTIVATION
        if node.op == "get_attr":
            origin = self.program.origins.get(str(node.target))
            return Role.WEIGHT if origin is None or origin.kind == "parameter" else Role.FIXED
        val = value(node)
        if node.op == "call_function" and not isinstance(val, torch.Tensor | tuple | list):
            return Role.SIZE
        if is_random(node):
            return Role.ACTIVATION
        if is_op(node, *_VALUES_IGNORED):
            fill = [n for n in node.all_input_nodes[1:] if isinstance(value(n), torch.Tensor)]
            return max((self(n) for n in fill), default=Role.FIXED, key=lambda r: r.value)
        roles = [self(n) for n in node.all_input_nodes]
        return max([Role.FIXED, *roles], key=lambda r: r.value)


_MOMENTS = (aten.mean, aten.sum, aten.var, aten.var_mean, aten.std, aten.linalg_vector_norm, aten.norm)
_FAR = 16


def _latents(program: Program, roles: dict[fx.Node, Role]) -> frozenset[fx.Node]:
    """Parameters that are tokens: normalised by hand, then projected or attended to as an input would be."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if is_op(node, *_MOMENTS) and roles[node] is Role.WEIGHT and _is_projected(node, roles):
            leaves = [n for n in _leaves(node) if roles[n] is Role.WEIGHT]
            found.update(n for n in leaves if value(n).dim() >= 2)
    return frozenset(found)


def _is_projected(node: fx.Node, roles: dict[fx.Node, Role]) -> bool:
    pending, seen = [node], {node}
    for _ in range(_FAR):
        if not pending:
            return False
        current = pending.pop(0)
        for user in current.users:
            if is_op(user, aten.linear) and user.args[0] is current and current is not user.args[1]:
                return True
            if is_op(user, aten.scaled_dot_product_attention, aten.cat):
                return True
            if roles[user] is Role.WEIGHT and user not in seen and not is_op(user, aten.linear):
                seen.add(user)
                pending.append(user)
    return False


def _leaves(node: fx.Node) -> list[fx.Node]:
    pending, seen = [node], {node}
    while pending:
        new = [n for n in pending.pop().all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)
    return [n for n in seen if n.op == "get_attr"]


def value_operands(node: fx.Node) -> list[fx.Node]:
    """Operands whose values matter: not the tensors that only lend their shape or dtype, not sizes."""
    operands = node.all_input_nodes
    if is_op(node, *_VALUES_IGNORED):
        operands = operands[1:]
    elif is_op(node, aten.type_as, aten.expand_as, aten.view_as, aten.reshape_as):
        operands = operands[:1]
    return [n for n in operands if isinstance(value(n), torch.Tensor | tuple | list)]
