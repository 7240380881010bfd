"""The vocabulary: one record for each known function, in one table; ours live in `torch.ops.normfuse`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from normfuse.ops import (
    batch_norm,
    crms_norm,
    derf,
    dyt,
    group_norm,
    instance_norm,
    l2_norm,
    layer_norm,
    log_softmax,
    rms_norm,
    scaled_dot_product_attention,
    softmax,
    softmax_over,
    standardize,
)
from normfuse.ops.define import Operator

OPERATORS = (
    layer_norm.OPERATOR,
    rms_norm.OPERATOR,
    rms_norm.OF_TORCH,
    crms_norm.OPERATOR,
    l2_norm.OPERATOR,
    standardize.OPERATOR,
    batch_norm.OPERATOR,
    group_norm.OPERATOR,
    instance_norm.OPERATOR,
    softmax.OPERATOR,
    log_softmax.OPERATOR,
    softmax_over.OPERATOR,
    scaled_dot_product_attention.OPERATOR,
    dyt.OPERATOR,
    derf.OPERATOR,
)
"""Every known function, norms first."""

_known = {packet: record for record in OPERATORS for packet in record.packets}


def operators() -> tuple[Operator, ...]:
    """All records: the table, then what has been added for a while."""
    return tuple(dict.fromkeys(_known.values()))


def operator_of(target: Any) -> Operator | None:
    """The record of an operator, by overload or packet."""
    try:
        return _known.get(getattr(target, "overloadpacket", target))
    except TypeError:  # what cannot be hashed is no operator
        return None


def operator_named(stem: str) -> Operator:
    """The record with this stem, ours first. Raises `KeyError`."""
    found = [record for record in operators() if record.stem == stem]
    if not found:
        raise KeyError(stem)
    return max(found, key=lambda record: record.ours)


@contextmanager
def with_operator(record: Operator) -> Generator[Operator]:
    """One more known function, everywhere, within the context."""
    if record.packet in _known:
        raise ValueError(f"{record.stem} is a known function already")
    _known.update(dict.fromkeys(record.packets, record))
    try:
        yield record
    finally:
        for packet in record.packets:
            del _known[packet]


__all__ = ["OPERATORS", "Operator", "operator_named", "operator_of", "operators", "with_operator"]
