"""Where each output channel of a projection goes: through views, heads and token mixing, to what multiplies it again.

Every output channel gets a label, its own number, and the labels are moved through the graph as the values are: by
running the very operators on a tensor of labels. So any way of splitting, interleaving, repeating and merging heads is
followed alike. Attention mixes tokens and leaves channels where they are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.analysis.projections import Projection, projection
from normfuse.graph.node import (
    argument,
    aten,
    invoke,
    is_getitem,
    is_op,
    operands,
    place_in,
    rank,
    readers,
    same_size,
    shape,
    value,
)
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.traits import Trait, is_a

_MOVES = Trait.VIEW | Trait.COPY | Trait.REPEAT | Trait.ROLL
_SAME = (aten.dropout, aten.to, aten._to_copy, aten.neg)
HOMOGENEOUS = (aten.relu, aten.leaky_relu)
"""f(s x) = s f(x) for every s > 0."""


@dataclass(frozen=True)
class End:
    """`reader` multiplies the channels by weights: input channel j is the writer's channel `labels[j]` (-1: none)."""

    reader: Projection
    labels: Tensor


@dataclass
class Route:
    """What becomes of the channels that one operator writes."""

    ends: list[End] = field(default_factory=list)
    mixed: dict[fx.Node, Tensor] = field(default_factory=dict)
    """Token mixing (attention): labels by (head, channel of the head)."""
    scored: dict[tuple[fx.Node, str], Tensor] = field(default_factory=dict)
    """Attention that takes its "query" or "key" from here: labels by (batch and head, channel of the head)."""
    blocked: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    """Who else uses which channels."""
    ties: list[Tensor] = field(default_factory=list)
    """Pairs of labels that are added to each other (RoPE turns two channels together): they take one scale."""
    smoothed: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    """SiLU passed, if that was asked for, with its labels: it takes the scale as a factor of its own."""

    def blocker_of(self, labels: Tensor) -> fx.Node | None:
        return next((node for node, used in self.blocked if bool(torch.isin(labels, used).any())), None)


class Routes:
    """`route(node, axis)` follows what `node` computes, with its channels along `axis`.

    `scales`: also through what commutes with a positive factor per channel (ReLU, products with other tensors, sums and
    concatenations of these very channels), to depthwise and grouped convolutions, too. `silu`: also through SiLU.
    """

    def __init__(self, program: Program) -> None:
        self.weights = weight_only(program)
        self.order = {node: place for place, node in enumerate(program.graph.nodes)}

    def route(self, node: fx.Node, axis: int, *, scales: bool = False, silu: bool = False) -> Route:
        route, labels = Route(), {node: _numbered(node, axis)}
        pending = [(self.order[user], user) for user in readers(node)]
        heapq.heapify(pending)
        done: set[fx.Node] = set()
        while pending:
            _, user = heapq.heappop(pending)
            if user in done:
                continue
            done.add(user)
            moved = self._step(user, labels, route, scales, silu)
            if moved is not None:
                labels[user] = moved
                for following in readers(user):
                    heapq.heappush(pending, (self.order[following], following))
        return route

    def _step(self, user: fx.Node, labels: dict[fx.Node, Any], route: Route, scales: bool, silu: bool) -> Any:
        inputs = [n for n in user.all_input_nodes if n in labels and user in readers(n)]
        if is_op(user, aten.scaled_dot_product_attention):
            _score(user, labels, route)
        mixed = self._mix(user, labels, route)
        if mixed is not None:
            return mixed
        if scales and (joined := _join(user, labels, route)) is not None:
            return joined
        if len(inputs) == 1:
            if silu and is_op(user, aten.silu):
                route.smoothed.append((user, labels[inputs[0]]))
                return labels[inputs[0]]
            moved = _move(user, labels[inputs[0]], inputs[0], scales)
            if moved is not None:
                return moved
            end = self._end(user, inputs[0], labels[inputs[0]], scales)
            if end is not None:
                route.ends.append(end)
                return None
        route.blocked += [(user, _all_of(labels[n])) for n in inputs]
        return None

    def _mix(self, user: fx.Node, labels: dict[fx.Node, Any], route: Route) -> Tensor | None:
        """P @ V, written out or as one operator: the channels of V go on, those of P are used up."""
        if is_op(user, aten.scaled_dot_product_attention):
            carried, others = argument(user, "value"), [argument(user, n) for n in ("query", "key", "attn_mask")]
        elif is_op(user, aten.matmul, aten.bmm) and rank(user) > 2:
            carried, others = user.args[1], [user.args[0]]
        else:
            return None
        if carried not in labels:
            return None
        by_head = labels[carried][..., :1, :]
        if not bool((labels[carried] == by_head).all()):
            return None  # the channels lie along the axis that is summed over
        for other in others:
            if isinstance(other, fx.Node) and other in labels:
                route.blocked.append((user, _all_of(labels[other])))
        sizes = [_size(s) for s in value(user).shape]
        if len(sizes) >= 3 and by_head.dim() == len(sizes) and by_head.shape[-3] not in (1, sizes[-3]):
            by_head = by_head.repeat_interleave(sizes[-3] // by_head.shape[-3], -3)  # enable_gqa
        route.mixed[user] = _distinct_rows(by_head)
        return by_head.broadcast_to(sizes).clone()

    def _end(self, user: fx.Node, source: fx.Node, labels: Any, grouped: bool) -> End | None:
        found = projection(user, source, self.weights)
        if found is None or not isinstance(labels, Tensor) or (found.groups != 1 and not grouped) or labels.dim() < 2:
            return None
        along = labels.movedim(found.channel_axis, -1).flatten(0, -2)
        return End(found, along[0].clone()) if bool((along == along[:1]).all()) else None


def _join(node: fx.Node, labels: dict[fx.Node, Any], route: Route) -> Tensor | None:
    """Sums and concatenations whose every part is made of these channels."""
    if is_op(node, aten.cat, aten.stack):
        parts = [labels.get(part) for part in operands(node)]
        whole = all(isinstance(part, Tensor) for part in parts)
        return invoke(node, (parts, *node.args[1:]), node.kwargs) if whole else None
    if not is_op(node, aten.add, aten.sub):
        return None
    a, b = (labels.get(argument(node, name)) for name in ("self", "other"))  # type: ignore[arg-type]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return None
    route.ties.append(torch.stack([a.flatten(), b.flatten()], -1).unique(dim=0))
    return a


def _score(attention: fx.Node, labels: dict[fx.Node, Any], route: Route) -> None:
    heads = [_size(s) for s in value(argument(attention, "query")).shape][-3:-2]
    for name in ("query", "key"):
        found = labels.get(argument(attention, name))
        if isinstance(found, Tensor) and bool((found == found[..., :1, :]).all()):
            rows = found[..., 0, :]
            if heads and rows.dim() > 1 and rows.shape[-2] not in (1, heads[0]):
                rows = rows.repeat_interleave(heads[0] // rows.shape[-2], -2)  # enable_gqa
            route.scored[attention, name] = rows.flatten(0, -2)


def _numbered(node: fx.Node, axis: int) -> Tensor:
    sizes = [_size(s) for s in value(node).shape]
    axis %= len(sizes)
    shape = [sizes[axis] if i == axis else 1 for i in range(len(sizes))]
    return torch.arange(sizes[axis]).reshape(shape).expand(sizes).clone()


def _size(size: Any) -> int:
    """A free size as it was in the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def _move(node: fx.Node, labels: Any, source: fx.Node, scales: bool) -> Any:
    if is_getitem(node):
        return labels[place_in(node)] if isinstance(labels, tuple | list) else None
    if is_op(node, *_SAME) and value(node).is_floating_point():
        return labels
    if _times_one_number(node, source) or (scales and _commutes_with_scales(node, source)):
        return labels
    if not is_a(node, _MOVES) or not isinstance(labels, Tensor):
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: labels if n is source else _number(n))
    return invoke(node, args, kwargs)


def _number(node: fx.Node) -> Any:
    v = value(node)
    return _size(v) if isinstance(v, int | torch.SymInt) else v


def _times_one_number(node: fx.Node, source: fx.Node) -> bool:
    if not is_op(node, aten.mul, aten.div) or node.kwargs.get("rounding_mode") is not None:
        return False
    if node.args[0] is not source:
        return False
    other = node.args[1]
    return isinstance(other, int | float) or (isinstance(v := value(other), Tensor) and v.numel() == 1)


def _commutes_with_scales(node: fx.Node, source: fx.Node) -> bool:
    if is_op(node, *HOMOGENEOUS):
        return True
    if not is_op(node, aten.mul, aten.div) or node.kwargs.get("rounding_mode") is not None:
        return False
    first = is_op(node, aten.mul) or node.args[0] is source
    return first and node.args[0] is not node.args[1] and _same_shape(node, source)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return rank(a) == rank(b) and all(same_size(x, y) for x, y in zip(shape(a), shape(b), strict=True))


def _distinct_rows(labels: Tensor) -> Tensor:
    """The rows (last axis) in order of first appearance."""
    rows = labels.flatten(0, -2).tolist()
    return torch.tensor(list(dict.fromkeys(map(tuple, rows))))


def _all_of(labels: Any) -> Tensor:
    flat = labels if isinstance(labels, Tensor) else torch.cat([part.flatten() for part in labels])
    return flat.unique()


def columns_of(labels: Tensor, heads: Tensor) -> Tensor | None:
    """Input channels (head, copy, channel of the head) at which an `End` reads these heads; None if copies differ."""
    places = [[(labels == label).nonzero().flatten() for label in head] for head in heads.tolist()]
    counts = {len(found) for head in places for found in head}
    if len(counts) != 1 or counts == {0}:
        return None
    return torch.stack([torch.stack(head, -1) for head in places])
