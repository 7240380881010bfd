"""BatchNorm, torch's own; it is counted where its statistics are stored ones."""

from __future__ import annotations

from collections.abc import Sequence

from normfuse.ops.define import Given, Operator, Sizes


def kind(given: Given) -> str | None:
    return None if given["training"] else "batch_norm"


def axes(given: Given, sizes: Sizes) -> Sequence[int]:
    return (0, *range(2, len(sizes)))


OPERATOR = Operator(
    "batch_norm",
    role="norm",
    kind=kind,
    kinds=("batch_norm",),
    source="Ioffe & Szegedy 2015, arXiv 1502.03167",
    axes=axes,
    fixed=("running_mean", "running_var"),
    row=False,
    each=2,
    factors=(),  # inference folds the statistics into gain and shift
)
