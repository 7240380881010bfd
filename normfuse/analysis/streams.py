"""Residual streams: connected tensors that carry one channel axis, who writes them and who reads them.

A stream is found from a tensor (say, the input of a norm) by following the axis through carriers (`axes`) in both
directions. Where a carrier ends, the stream has a *writer* (what produces the channels: a projection, an embedding, a
parameter, anything) or a *reader* (what uses them otherwise: a norm, a projection, the output of the model).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from normfuse.analysis.axes import carried_operands, carried_to
from normfuse.graph.node import readers
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class Writer:
    """`node` puts channels into the stream along `axis`; a weight enters where `reader` reads it."""

    node: fx.Node
    axis: int
    reader: fx.Node | None = None

    @property
    def is_weight(self) -> bool:
        return self.reader is not None


@dataclass(frozen=True)
class Reader:
    """`node` uses the stream tensor `tensor`, whose channels lie along `axis`, and carries them no further."""

    node: fx.Node
    tensor: fx.Node
    axis: int


@dataclass
class Stream:
    """All tensors of one stream with their channel axis, its writers and its readers, in graph order."""

    width: object
    tensors: dict[fx.Node, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)


def stream_of(
    tensor: fx.Node, axis: int, weights: frozenset[fx.Node], through: frozenset[fx.Node] = frozenset()
) -> Stream:
    """The stream that `tensor` belongs to with its channels along `axis`.

    `through`: operators that commute with the map one has in mind, from their first input to the same axis of their
    result, although they are no carriers (a norm without gain, for rotations).
    """
    val = tensor.meta["val"]
    stream = Stream(val.shape[axis])
    pending = [(tensor, axis)]
    writers: dict[Writer, None] = {}
    outs: dict[Reader, None] = {}
    while pending:
        node, at = pending.pop()
        if node in stream.tensors:
            continue
        stream.tensors[node] = at
        operands = None if node in weights else carried_operands(node, at)
        if node in through:
            operands = [(node.all_input_nodes[0], at)]
        if operands is None:
            writers[Writer(node, at)] = None
        for source, source_axis in operands or []:
            if source in weights:
                writers[Writer(source, source_axis, reader=node)] = None
            else:
                pending.append((source, source_axis))
        for user in readers(node):
            target = None if user.op == "output" else carried_to(user, node, at)
            if user in through:
                target = at
            if target is None:
                outs[Reader(user, node, at)] = None
            else:
                pending.append((user, target))
    stream.writers = sorted(writers, key=lambda w: (w.reader or w.node))
    stream.readers = sorted(outs, key=lambda r: r.node)
    return stream


_LOOKS = Trait.WHOLE | Trait.EXPAND | Trait.PART | Trait.COPY | Trait.ROLL


def ends_of(tensor: fx.Node, axis: int) -> list[Reader]:
    """Who reads the values of `tensor` in the end, looking through views that keep the channel axis whole."""
    found: list[Reader] = []
    pending = [(tensor, axis)]
    while pending:
        node, at = pending.pop(0)
        for user in readers(node):
            target = carried_to(user, node, at) if is_a(user, _LOOKS) else None
            if target is None:
                found.append(Reader(user, node, at))
            else:
                pending.append((user, target))
    return found
