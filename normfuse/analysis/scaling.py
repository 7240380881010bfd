"""Where factors per channel can move: from a writer to all its readers, and between queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.analysis.heads import also_used
from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.routes import End, Routes
from normfuse.analysis.row_functions import norm_over_last
from normfuse.graph.node import argument, op_name, rank, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only


@dataclass(frozen=True)
class Pair:
    """`writer` (a norm or a projection) writes channels, of which those in `free` are read by `ends` alone.

    Where they pass a SiLU on the way, it is in `smoothed`, with the channel that each of its numbers belongs to.
    """

    writer: fx.Node
    projection: Projection | None
    free: Tensor
    ends: tuple[End, ...] = ()
    smoothed: tuple[tuple[fx.Node, Tensor], ...] = ()

    @property
    def inputs(self) -> list[fx.Node]:
        return [argument(end.reader.node, end.reader.input_name) for end in self.ends]

    def copies(self, end: End) -> Tensor:
        """(copy, channel): the inputs at which the end reads each of the writer's channels; 0 where it does not."""
        places = [(end.labels == label).nonzero().flatten() for label in range(len(self.free))]
        most = max(len(found) for found in places)
        fill = [found if len(found) else torch.zeros(1, dtype=torch.long) for found in places]
        return torch.stack([found[torch.arange(most).clamp(max=len(found) - 1)] for found in fill], -1)

    def reads(self, end: End) -> Tensor:
        return torch.isin(torch.arange(len(self.free)), end.labels)


def pairs(program: Program, *, silu: bool = False) -> tuple[list[Pair], dict[fx.Node, str]]:
    """Every writer some of whose channels take a factor, and why others do not."""
    routes, found, refused = Routes(program), [], {}
    for node in _writers(program):
        pair = _pair(node, routes, silu)
        if isinstance(pair, Pair):
            found.append(pair)
        elif pair:
            refused[node] = pair
    return found, refused


def _writers(program: Program) -> Iterator[fx.Node]:
    weights = weight_only(program)
    for node in list(program.graph.nodes):
        writer = projection(node, None, weights)
        if ((writer is not None and writer.groups == 1) or norm_over_last(node)) and node not in weights:
            yield node


def _axis(node: fx.Node, writer: Projection | None) -> int:
    return rank(node) - 1 if writer is None else writer.channel_axis % rank(node)


def _pair(node: fx.Node, known: Routes, silu: bool) -> Pair | str:
    writer = projection(node, None, known.weights)
    axis = _axis(node, writer)
    route = known.route(node, axis, scales=True, silu=silu)
    free = torch.ones(int(shape(node)[axis]), dtype=torch.bool)
    for _, used in route.blocked:
        free[used] = False
    for tied in route.ties:
        free[tied[tied[:, 0] != tied[:, 1]]] = False
    read = torch.cat([end.labels for end in route.ends]) if route.ends else torch.empty(0, dtype=torch.long)
    free &= torch.isin(torch.arange(len(free)), read)
    if bool(free.any()):
        ends = tuple(end for end in route.ends if bool(free[end.labels.clamp(min=0)][end.labels >= 0].any()))
        smoothed = tuple((act, labels) for act, labels in route.smoothed if bool(free[labels].any()))
        return Pair(node, writer, free, ends, smoothed)
    blocker = next(iter(route.blocked), None)
    return f"{op_name(blocker[0])} at {site(blocker[0])} does not pass scales of its input on" if blocker else ""


# -- queries and keys


@dataclass(frozen=True)
class ScorePair:
    """Queries and keys of attention at `node`: whatever the ones are divided by, the others must be multiplied by.

    Channels that stand in one class take one scale: RoPE turns two channels together, and a key head may meet several
    query heads. `queries`, `keys`: the class of each channel of the two writers, -1 for one that is none of them.
    """

    node: fx.Node
    query: Pair
    key: Pair
    queries: Tensor
    keys: Tensor


Side = tuple[Pair, Tensor, list[Tensor]]


def score_pairs(program: Program) -> tuple[list[ScorePair], dict[fx.Node, str]]:
    """Every attention whose queries and keys are written by two writers, and why other writers of them are left."""
    routes = Routes(program)
    sides: dict[fx.Node, dict[str, Side | str]] = {}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in _writers(program):
        writer = projection(node, None, routes.weights)
        axis = _axis(node, writer)
        route, width = routes.route(node, axis, scales=True), int(shape(node)[axis])
        for (attention, name), rows in route.scored.items():
            classes = _classes(width, route.ties)
            free = torch.isin(classes, classes[rows.flatten()])
            why = also_used(attention, name, free.nonzero().flatten(), route)
            sides.setdefault(attention, {})[name] = (Pair(node, writer, free), rows, route.ties) if why is None else why
            writers.setdefault(attention, []).append(node)
    found = {attention: _matched(attention, given) for attention, given in sides.items()}
    refused = {node: why for attention, why in found.items() if isinstance(why, str) for node in writers[attention]}
    return [pair for pair in found.values() if isinstance(pair, ScorePair)], refused


def _matched(attention: fx.Node, sides: Mapping[str, Side | str]) -> ScorePair | str:
    query, key = sides.get("query", ""), sides.get("key", "")
    if isinstance(query, str) or isinstance(key, str):
        why = next((side for side in (query, key) if isinstance(side, str) and side), None)
        return why or "its queries or its keys come from no writer whose channels take a scale"
    if query[0].writer is key[0].writer:
        return "one projection writes queries and keys: a scale per channel cannot tell them apart"
    if query[1].shape != key[1].shape:
        return "the heads of its queries and keys do not go together"
    count = len(query[0].free)
    met = torch.stack([query[1].flatten(), key[1].flatten() + count], -1).unique(dim=0)
    classes = _classes(count + len(key[0].free), [met, *query[2], *(tied + count for tied in key[2])])
    own = (torch.where(query[0].free, classes[:count], -1), torch.where(key[0].free, classes[count:], -1))
    return ScorePair(attention, query[0], key[0], *own)


def _classes(count: int, edges: list[Tensor]) -> Tensor:
    """The smallest number that each of 0 .. count-1 is connected with."""
    found, before = torch.arange(count), torch.empty(0)
    both = torch.cat([torch.empty(0, 2, dtype=torch.long), *edges, *(e.flip(-1) for e in edges)])
    while not torch.equal(found, before):
        before = found
        found = found.scatter_reduce(0, both[:, 0], found[both[:, 1]], "amin")
    return found
