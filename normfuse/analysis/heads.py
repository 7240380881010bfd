"""Value and output of attention, head by head: which rows of one weight make a head, which columns of others read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.routes import Route, Routes, columns_of
from normfuse.node import op_name, rank, site
from normfuse.program import Program


@dataclass(frozen=True)
class ValueHeads:
    """`rows` (head, channel) of `writer`'s outputs pass attention at `mix` and are read at `columns` of the readers.

    `columns` are (head, copy, channel): grouped attention reads one value head several times.
    """

    writer: Projection
    rows: Tensor
    mix: fx.Node
    readers: tuple[tuple[Projection, Tensor], ...]


def value_heads(program: Program) -> tuple[list[ValueHeads], dict[fx.Node, str]]:
    """Every value/output pair of the program, and why other attentions have none that can be changed."""
    routes, found, refused = Routes(program), [], {}
    for node in program.graph.nodes:
        writer = projection(node, None, routes.weights)
        if writer is None or writer.groups != 1 or node in routes.weights:
            continue
        route = routes.route(node, writer.channel_axis % rank(node))
        for mix, rows in route.mixed.items():
            pair = _pair(writer, mix, rows, route)
            if isinstance(pair, str):
                refused[mix] = pair
            else:
                found.append(pair)
    return found, {mix: why for mix, why in refused.items() if all(pair.mix is not mix for pair in found)}


def _pair(writer: Projection, mix: fx.Node, rows: Tensor, route: Route) -> ValueHeads | str:
    labels = rows.flatten()
    if len(labels.unique()) != len(labels):
        return "the heads share value channels without being alike"
    if (blocker := route.blocker_of(labels)) is not None:
        return f"the values are also read by {op_name(blocker)} at {site(blocker)}"
    if sum(bool(torch.isin(labels, other).any()) for other in route.mixed.values()) != 1:
        return "the values pass attention more than once"
    readers: list[tuple[Projection, Tensor]] = []
    for end in route.ends:
        if not bool(torch.isin(end.labels, labels).any()):
            continue
        columns = columns_of(end.labels, rows)
        if columns is None:
            return f"{site(end.reader.node)} reads only part of the heads"
        readers.append((end.reader, columns))
    return ValueHeads(writer, rows, mix, tuple(readers)) if readers else "no projection reads the heads"
