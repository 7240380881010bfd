"""LayerNorm over trailing axes, torch's own."""

from __future__ import annotations

from collections.abc import Sequence

from normfuse.ops.define import Given, Operator, Sizes


def trailing(given: Given, sizes: Sizes) -> Sequence[int]:
    """As many as `normalized_shape` has sizes."""
    return range(-len(given["normalized_shape"]), 0)


OPERATOR = Operator(
    "layer_norm",
    role="norm",
    kind="layer_norm",
    source="Ba et al. 2016, arXiv 1607.06450",
    axes=trailing,
    centred=True,
    odd=True,
    homogeneous=True,
    mean_blind=True,
    bounded=True,
    each=5,
)
LAYER_NORM = OPERATOR.packet
