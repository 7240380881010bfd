"""What a chain of views does to a tensor, found by sending numbered elements through it: meaning, not spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph.node import expression, invoke, is_getitem, operand, rank, readers, same_size, shape, value
from normfuse.ops.traits import Trait, is_a

_LAYOUT = Trait.WHOLE | Trait.PART | Trait.PARTS | Trait.COPY
_PRIMES = (2, 3, 5, 7, 11, 13)
_DOUBLINGS = 14
"""What strided convolutions leave of a short signal is nothing: theirs are tried longer."""


def is_layout(node: Any) -> bool:
    """Does the node only move elements, and read one tensor?"""
    return is_getitem(node) or is_a(node, _LAYOUT)


def root_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The first ancestor that computes something, and the layout operators between it and the node, in order."""
    chain: list[fx.Node] = []
    while is_layout(node):
        chain.append(node)
        node = operand(node)
    return node, chain[::-1]


@dataclass(frozen=True)
class Heads:
    """A tensor (batch, heads, length, width) that is a look at the channels from `offset` on of `root`."""

    root: fx.Node
    offset: int
    heads: int
    width: int

    @property
    def channels(self) -> int:
        return self.heads * self.width

    @property
    def is_whole(self) -> bool:
        return self.offset == 0 and self.channels == shape(self.root)[-1]


def heads_of(node: fx.Node) -> Heads | None:
    """`node`[b, h, s, d] = root[b, s, offset + h * width + d] for all sizes, or None."""
    root, chain = root_of(node)
    if rank(root) != 3 or rank(node) != 4 or not isinstance(shape(root)[-1], int):
        return None
    heads, width = shape(node)[1], shape(node)[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    if not same_size(shape(node)[0], shape(root)[0]) or not same_size(shape(node)[2], shape(root)[1]):
        return None
    offsets = {_offset(root, chain, primes) for primes in (_PRIMES, _PRIMES[2:])}
    offset = offsets.pop() if len(offsets) == 1 else None
    return None if offset is None else Heads(root, offset, heads, width)


def _offset(root: fx.Node, chain: Sequence[fx.Node], primes: Sequence[int]) -> int | None:
    sizes = _numbers(root, primes)
    if sizes is None:
        return None
    exact = [concrete(s, sizes) for s in shape(root)]
    numbered = torch.arange(math.prod(exact)).reshape(exact)
    found = _through(chain, root, numbered, sizes)
    if found is None or found.dim() != 4 or not found.numel():
        return None
    offset = int(found.flatten()[0])
    channels = found.shape[1] * found.shape[3]
    if offset + channels > exact[2]:
        return None
    wanted = numbered[..., offset : offset + channels].unflatten(-1, (found.shape[1], found.shape[3])).transpose(1, 2)
    return offset if found.shape == wanted.shape and torch.equal(found, wanted) else None


def merged_heads(node: fx.Node) -> fx.Node | None:
    """The reader that puts the heads of `node` (batch, heads, length, width) side by side, if a chain leads to one."""
    chain: list[fx.Node] = []
    current = node
    while len(users := readers(current)) == 1:
        current = users[0]
        if not is_layout(current):
            return None
        chain.append(current)
        if (
            rank(current) == 3
            and same_size(shape(current)[1], shape(node)[2])
            and all(_is_merged(node, chain, primes) for primes in (_PRIMES, _PRIMES[2:]))
        ):
            return current
    return None


def _is_merged(node: fx.Node, chain: Sequence[fx.Node], primes: Sequence[int]) -> bool:
    sizes = _numbers(node, primes)
    if sizes is None:
        return False
    exact = [concrete(s, sizes) for s in shape(node)]
    numbered = torch.arange(math.prod(exact)).reshape(exact)
    found = _through(chain, node, numbered, sizes)
    wanted = numbered.transpose(1, 2).flatten(2)
    return found is not None and found.shape == wanted.shape and torch.equal(found, wanted)


# -- sizes as numbers


def _numbers(node: fx.Node, primes: Sequence[int]) -> dict[Any, int] | None:
    """A number for each free symbol of the node's shape: primes, doubled until no size is less than one."""
    symbols: list[Any] = []
    for size in shape(node):
        symbols += [s for s in sorted(getattr(expression(size), "free_symbols", ()), key=str) if s not in symbols]
    for doublings in range(_DOUBLINGS if len(symbols) <= len(primes) else 0):
        numbers = {symbol: prime << doublings for symbol, prime in zip(symbols, primes, strict=False)}
        if all(concrete(size, numbers) > 0 for size in shape(node)):
            return numbers
    return None


def concrete(size: Any, numbers: Mapping[Any, int]) -> int:
    """A symbolic size under these values of the symbols."""
    expr = expression(size)
    return int(expr if isinstance(expr, int) else expr.subs(numbers))


def _through(chain: Sequence[fx.Node], root: fx.Node, tensor: Tensor, numbers: Mapping[Any, int]) -> Tensor | None:
    """The tensor after the chain; None where a size is not a number of the root's symbols, or the chain does not fit."""
    env: dict[fx.Node, Any] = {root: tensor}

    def given(node: fx.Node) -> Any:
        return env[node] if node in env else concrete(value(node), numbers)

    try:
        for node in chain:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given)
            env[node] = invoke(node, args, kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return env[chain[-1]] if chain else tensor
