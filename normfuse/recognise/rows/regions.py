"""Cutting candidate regions out of a graph: where the statistics of a norm come from, and what they flow into.

A *source* is a tensor that every path into a reduction runs through (a dominator, found by a bounded search upwards). Its
*region* is what can be computed from it by cheap operators alone, bounded in size. Whatever else enters the region is a
*side*: a size, a fixed tensor, a weight, or an activation, which then stands for any value whatever; so what holds of a
region for all values of its sides holds in the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph.node import argument, aten, expression, is_one, is_op, rank, shape, value
from normfuse.graph.roles import Role, Roles, value_operands
from normfuse.graph.walk import walk
from normfuse.ops.traits import Trait, is_a

MAX_REGION = 56
MAX_CLIMB = 48
MAX_SOURCES = 7

_HEAVY = (
    aten.embedding, aten.scaled_dot_product_attention, aten.gather, aten.scatter, aten.sort, aten.topk, aten.index_put,
    aten.lstm, aten.gru,
    aten.index, aten.index_select, aten.multinomial, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    aten.upsample_nearest2d, aten.max_pool2d, aten.unfold, aten.im2col, aten.nonzero, aten.dropout, aten.bernoulli,
    aten._scaled_dot_product_flash_attention_for_cpu, aten.cdist, aten.item,
)  # fmt: skip
WIDE = tuple(op for op in _HEAVY if op not in (aten.sort, aten.topk, aten.gather))
"""What no region may hold that is asked for what has a name, whatever it costs."""


@dataclass
class Region:
    """The nodes computed from `source`, in order, and what else they read. `key` is equal for equal functions."""

    source: fx.Node
    nodes: list[fx.Node]
    sides: list[fx.Node]
    key: Any = None
    index: dict[fx.Node, int] = field(default_factory=dict)

    def inside(self, root: fx.Node) -> set[fx.Node]:
        """The nodes of the region that `root` needs."""
        starts = [root] if root in self.index else []
        return set(walk(starts, lambda node: [n for n in node.all_input_nodes if n in self.index]))


def is_cheap(node: fx.Node, roles: Roles, within: Callable[[fx.Node], bool], heavy: tuple[Any, ...] = _HEAVY) -> bool:
    """May a region hold this operator? Products only with fixed tensors, or of what is within with itself."""
    if node.op != "call_function" or is_op(node, *heavy) or is_a(node, Trait.TRANSPOSED):
        return False
    val = value(node)
    if not isinstance(val, Tensor | tuple | list):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    if is_a(node, Trait.PRODUCT):
        return all(within(n) or roles(n) is Role.FIXED for n in value_operands(node))
    if is_a(node, Trait.LINEAR | Trait.CONVOLUTION):
        return roles(argument(node, "weight")) is Role.FIXED and argument(node, "bias") is None
    if is_op(node, aten.einsum):
        operands = value_operands(node)
        return all(within(n) or roles(n) is Role.FIXED or rank(n) <= 1 for n in operands)
    return True


def sources_of(node: fx.Node, roles: Roles, heavy: tuple[Any, ...] = _HEAVY, far: int = MAX_CLIMB) -> list[fx.Node]:
    """Dominators of a node, nearest first, as far up as cheap operators reach."""
    found: list[fx.Node] = []
    pending: list[tuple[Any, fx.Node]] = []
    seen: set[fx.Node] = set()

    def push(reader: fx.Node) -> None:
        for operand in value_operands(reader):
            if operand not in seen and roles(operand) is Role.ACTIVATION:
                seen.add(operand)
                heapq.heappush(pending, (_Later(operand), operand))

    push(node)
    for _ in range(far):
        if not pending:
            break
        _, top = heapq.heappop(pending)
        if not pending and isinstance(value(top), Tensor):
            found.append(top)
            if len(found) >= MAX_SOURCES:
                break
        if not is_cheap(top, roles, lambda n: roles(n) is Role.ACTIVATION, heavy):
            break
        push(top)
    return [n for n in found if value(n).is_floating_point()]


class _Later:
    """Orders nodes by their place in the graph, last first."""

    __slots__ = ("node",)

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __lt__(self, other: _Later) -> bool:
        return other.node < self.node


def region_from(
    source: fx.Node,
    roles: Roles,
    describe: Callable[[fx.Node], Any],
    bound: int = MAX_REGION,
    heavy: tuple[Any, ...] = _HEAVY,
) -> Region:
    """The region of a source. `describe` gives what of a side's value the function depends on."""
    inside: dict[fx.Node, int] = {}
    pending: list[fx.Node] = []
    queued: set[fx.Node] = set()

    def push(node: fx.Node) -> None:
        for user in node.users:
            if user not in queued and user.op == "call_function":
                queued.add(user)
                heapq.heappush(pending, user)

    push(source)
    while pending and len(inside) < bound:
        node = heapq.heappop(pending)
        if not any(n is source or n in inside for n in value_operands(node)):
            continue
        if _joins_another_stream(node, source, roles, inside):
            continue
        if is_cheap(node, roles, lambda n: n is source or n in inside, heavy):
            inside[node] = len(inside) + 1
            push(node)
    region = Region(source, list(inside), [], index=inside)
    close(region, roles, describe)
    return region


def _joins_another_stream(node: fx.Node, source: fx.Node, roles: Roles, inside: dict[fx.Node, int]) -> bool:
    """A residual sum: what follows is no function of this source alone, and may be a whole network."""
    if not is_op(node, aten.add, aten.sub):
        return False
    operands = value_operands(node)
    mine = [n for n in operands if n is source or n in inside]
    foreign = [n for n in operands if n not in mine and roles(n) is Role.ACTIVATION]
    return bool(foreign) and any(len(shape(n)) == len(shape(source)) and _is_whole(n, source) for n in mine)


def _is_whole(node: fx.Node, source: fx.Node) -> bool:
    return all(is_one(a) == is_one(b) for a, b in zip(shape(node), shape(source), strict=True))


def close(region: Region, roles: Roles, describe: Callable[[fx.Node], Any]) -> None:
    """Collect the sides and spell the region as a hashable key."""
    sides: dict[fx.Node, int] = {}

    def local(item: Any) -> Any:
        if isinstance(item, fx.Node):
            if item is region.source:
                return ("s",)
            if item in region.index:
                return ("n", region.index[item])
            return ("e", sides.setdefault(item, len(sides)))
        if isinstance(item, tuple | list):
            return tuple(local(i) for i in item)
        if isinstance(item, dict):
            return tuple((k, local(v)) for k, v in item.items())
        return (type(item).__name__, repr(item)) if not isinstance(item, str) else item

    calls = tuple((node.target, local(node.args), local(node.kwargs)) for node in region.nodes)
    region.sides = list(sides)
    head = (_shape_key(region.source), value(region.source).dtype)
    parameters = tuple((roles(n), _shape_key(n), describe(n)) for n in region.sides)
    region.key = (head, calls, parameters)


def _shape_key(node: fx.Node) -> Any:
    return tuple(str(expression(s)) for s in shape(node))
