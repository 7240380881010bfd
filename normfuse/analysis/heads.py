"""Value and output of attention, head by head: which rows of one weight make a head, which columns of others read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.routes import Route, Routes, columns_of
from normfuse.graph.node import aten, is_op, op_name, rank, site
from normfuse.graph.program import Program


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


@dataclass(frozen=True)
class ScoreHeads:
    """Attention at `node` multiplies queries (head, copy, channel) of one projection by keys (head, channel) of another."""

    node: fx.Node
    query: Projection
    key: Projection
    query_rows: Tensor
    key_rows: Tensor


def score_heads(program: Program) -> tuple[list[ScoreHeads], dict[fx.Node, str]]:
    """Every query/key pair that nothing stands between, and what stands between the others."""
    routes = Routes(program)
    sides: dict[tuple[fx.Node, str], tuple[Projection, Tensor]] = {}
    refused: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        writer = projection(node, None, routes.weights)
        if writer is None or writer.groups != 1 or node in routes.weights:
            continue
        route = routes.route(node, writer.channel_axis % rank(node))
        for (attention, name), rows in route.scored.items():
            if (why := also_used(attention, name, rows, route)) is not None:
                refused[attention] = why
            else:
                sides[attention, name] = (writer, rows)
    found: list[ScoreHeads] = []
    for node in [n for n in program.graph.nodes if is_op(n, aten.scaled_dot_product_attention)]:
        query, key = sides.get((node, "query")), sides.get((node, "key"))
        if query is None or key is None:
            refused.setdefault(node, "queries or keys do not come straight from a projection: RoPE or a norm is between")
        elif (rows := _matched(query[1], key[1])) is None:
            refused[node] = "its heads do not go together one to one, or many queries to one key"
        else:
            found.append(ScoreHeads(node, query[0], key[0], *rows))
    return found, refused


def also_used(attention: fx.Node, name: str, rows: Tensor, route: Route) -> str | None:
    """What else than this side ("query", "key") of the attention uses the channels in `rows`."""
    labels = rows.unique()
    other = [used for key, used in route.scored.items() if key != (attention, name)]
    other += [*route.mixed.values(), *(end.labels for end in route.ends)]
    if any(bool(torch.isin(labels, used).any()) for used in other):
        return f"its {name} is used elsewhere, too"
    blocker = next((n for n, used in route.blocked if n is not attention and bool(torch.isin(labels, used).any())), None)
    return None if blocker is None else f"its {name} is also read by {op_name(blocker)} at {site(blocker)}"


def _matched(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    if query.shape != key.shape:
        return None
    groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        groups.setdefault(tuple(k), {})[tuple(q)] = None
    copies = {len(group) for group in groups.values()}
    if len(copies) != 1:
        return None
    queries = torch.tensor([[list(q) for q in group] for group in groups.values()])
    keys = torch.tensor([list(k) for k in groups])
    alone = len(queries.unique()) == queries.numel() and len(keys.unique()) == keys.numel()
    return (queries, keys) if alone else None


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
