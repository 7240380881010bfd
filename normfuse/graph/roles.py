"""What each node's value depends on: sizes alone, fixed tensors, parameters, or the inputs."""

from __future__ import annotations

from enum import Enum
from itertools import islice

import torch
from torch import fx

from normfuse.graph.node import aten, is_getitem, is_op, value
from normfuse.graph.program import Program
from normfuse.graph.walk import nearest, tensors_behind
from normfuse.ops.traits import Trait, is_a


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
            return self._of_number(node)
        if is_random(node):
            return Role.ACTIVATION
        if is_a(node, Trait.SHAPE_ONLY):
            fill = [n for n in node.all_input_nodes[1:] if isinstance(value(n), torch.Tensor)]
            return max((self(n) for n in fill), default=Role.FIXED, key=lambda r: r.value)
        roles = [self(n) for n in node.all_input_nodes]
        return max([Role.FIXED, *roles], key=lambda r: r.value)

    def _of_number(self, node: fx.Node) -> Role:
        """A size, or the entry of a tensor as a number: it is what the tensor is."""
        if is_a(node, Trait.SHAPE_ONLY):
            return Role.SIZE
        return max((self(n) for n in node.all_input_nodes if _is_value(n)), default=Role.SIZE, key=lambda r: r.value)


def _is_value(node: fx.Node) -> bool:
    """A placeholder that is a number is a size."""
    return node.op == "call_function" or isinstance(value(node), torch.Tensor)


_MOMENTS = (aten.mean, aten.sum, aten.var, aten.var_mean, aten.std, aten.linalg_vector_norm, aten.norm)
_FAR = 16


def _latents(program: Program, roles: dict[fx.Node, Role]) -> frozenset[fx.Node]:
    """Parameters that are tokens: normalised by hand, then projected or attended to as an input would be."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if is_op(node, *_MOMENTS) and roles[node] is Role.WEIGHT and _is_projected(node, roles):
            leaves = [n for n in tensors_behind(node) if roles[n] is Role.WEIGHT]
            found.update(n for n in leaves if value(n).dim() >= 2)
    return frozenset(found)


def _is_projected(node: fx.Node, roles: dict[fx.Node, Role]) -> bool:
    """Through weights alone, and not far."""

    def readers_that_are_weights(current: fx.Node) -> list[fx.Node]:
        return [user for user in current.users if roles[user] is Role.WEIGHT and not is_op(user, aten.linear)]

    return any(
        is_op(user, aten.scaled_dot_product_attention, aten.cat)
        or (is_op(user, aten.linear) and user.args[0] is current and current is not user.args[1])
        for current in islice(nearest([node], readers_that_are_weights), _FAR)
        for user in current.users
    )


def value_operands(node: fx.Node) -> list[fx.Node]:
    """Operands whose values matter: not the tensors that only lend their shape or dtype, not sizes."""
    operands = node.all_input_nodes
    if is_a(node, Trait.SHAPE_ONLY):
        operands = operands[1:]
    elif is_op(node, aten.type_as):
        operands = operands[:1]
    return [n for n in operands if isinstance(value(n), torch.Tensor | tuple | list)]




def is_random(node: fx.Node) -> bool:
    """Does the operator draw random numbers? (Dropout at inference does not.)"""
    if node.op != "call_function" or not hasattr(node.target, "tags"):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    if is_op(node, aten.scaled_dot_product_attention):
        return len(node.args) > 4 and bool(node.args[4] != 0.0)
    return not (is_op(node, aten.dropout, aten.feature_dropout, aten.alpha_dropout) and node.args[2] is False)


def constants(program: Program) -> frozenset[fx.Node]:
    """Nodes that depend on parameters, buffers and literals alone: no input, no free size, no random numbers."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        fixed = node.op == "call_function" and not is_random(node) and all(n in known for n in node.all_input_nodes)
        if fixed or node.op == "get_attr":
            known.add(node)
    return frozenset(known)


def weight_only(program: Program) -> frozenset[fx.Node]:
    """The constants that read at least one tensor of the model (a literal table such as `arange(4)` reads none)."""
    fixed = constants(program)
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" or (node in fixed and any(n in known for n in node.all_input_nodes)):
            known.add(node)
    return frozenset(known)


def is_view(node: fx.Node) -> bool:
    """Nothing is computed by it: another look at the same memory."""
    return is_a(node, Trait.VIEW) or is_getitem(node)


def frontier(program: Program) -> list[fx.Node]:
    """The computed weights: weight-only calls that something else reads, in graph order.

    A trailing view belongs to the weight if nothing reads the weight but through it.
    """
    inside = weight_only(program)
    found: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node in inside and any(user not in inside for user in node.users):
            views: list[fx.Node] = []
            while is_view(node):
                views.append(node)
                node = node.all_input_nodes[0]
            if node.op == "call_function" and isinstance(value(node), torch.Tensor):
                found[_with_own_views(node, views)] = None
    return list(found)



def _with_own_views(weight: fx.Node, views: list[fx.Node]) -> fx.Node:
    """The last of the views (outermost first) that stands alone on the weight and keeps its size."""
    while views and len(weight.users) == 1 and is_a(views[-1], Trait.WHOLE):
        weight = views.pop()
    return weight
