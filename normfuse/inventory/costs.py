"""What one norm, softmax or attention costs for the example inputs: bytes moved, floating-point operations.

Bytes are those of everything that the operator reads and of its result, each once: what a fused kernel has to move.
Operations are counted as one for each addition, multiplication, division, exponential, comparison or root.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph.node import argument, arguments, value
from normfuse.ops import Operator

_WEIGHTS = {"weight_norm": 3, "spectral_norm": 1, "weight_standardization": 5}
"""Operations on each element of weights that are normalised."""


def bytes_of(node: fx.Node) -> int:
    """Everything that the operator reads, and its result."""
    return sum(_bytes(n) for n in (*node.all_input_nodes, node))


def flop_of(record: Operator, node: fx.Node) -> int:
    """Operations of one call of a known function."""
    if record.role == "attention":
        return _attention(node)
    given = arguments(node)
    return (record.each_of(given) + sum(given.get(name) is not None for name in record.factors)) * count(node)


def _attention(node: fx.Node) -> int:
    """Two products, and for each score its scale, its bias, and five operations of the softmax."""
    query, key = _sizes(argument(node, "query")), _sizes(argument(node, "key"))
    scores = math.prod(query[:-1]) * key[-2]
    width = _sizes(node)[-1]
    masked = argument(node, "attn_mask") is not None
    return scores * (2 * query[-1] + 2 * width + 6 + masked)


def weight_cost(kind: str, node: fx.Node) -> tuple[int, int]:
    """(bytes, operations) of a normalised weight, as the model itself computes it at every call."""
    return 2 * _bytes(node), _WEIGHTS.get(kind, 0) * count(node)


def count(node: fx.Node) -> int:
    """Elements of the result."""
    return math.prod(_sizes(node))


def _sizes(node: Any) -> tuple[int, ...]:
    v = value(node)
    return tuple(_hint(s) for s in v.shape) if isinstance(v, Tensor) else ()


def _hint(size: int | torch.SymInt) -> int:
    """A free size is that of the example."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.hint is not None else 1


def _bytes(node: fx.Node) -> int:
    v = value(node)
    return math.prod(_sizes(node)) * v.element_size() if isinstance(v, Tensor) else 0


_PREFIXES = ("", "k", "M", "G", "T", "P")


def human(number: float, unit: str = "") -> str:
    """`1.23 MB`, `456 k`: three digits and a power of a thousand."""
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = 2 - (int(math.log10(number)) if number >= 1 else 0) if power else 0
    return f"{number:.{digits}f} {_PREFIXES[power]}{unit}".rstrip()


__all__ = ["bytes_of", "count", "flop_of", "human", "weight_cost"]
