"""The one walk over a graph: everything that steps lead to, each node once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import fx

Step = Callable[[fx.Node], Iterable[fx.Node]]


def inputs(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def walk(starts: Iterable[fx.Node], step: Step = inputs) -> Iterator[fx.Node]:
    """The starts and all that `step` leads to from them, depth first, the first of several ways before the others.

    A node is yielded before its steps are taken, so a caller may leave as soon as it has seen enough.
    """
    pending = list(starts)[::-1]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(reversed([n for n in step(node) if n not in seen]))


def nearest(starts: Iterable[fx.Node], step: Step) -> Iterator[fx.Node]:
    """The same, those of fewest steps first: for searches that give up after some of them."""
    pending = list(starts)
    seen = set(pending)
    for node in pending:  # it grows meanwhile
        yield node
        fresh = [n for n in step(node) if n not in seen]
        seen.update(fresh)
        pending.extend(dict.fromkeys(fresh))


def behind(*nodes: fx.Node) -> Iterator[fx.Node]:
    """The nodes and everything that they are computed from."""
    return walk(nodes)


def tensors_behind(*nodes: fx.Node) -> Iterator[fx.Node]:
    """The tensors of the program that the nodes are computed from."""
    return (node for node in walk(nodes) if node.op == "get_attr")
