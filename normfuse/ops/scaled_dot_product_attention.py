"""Attention in one operator, torch's own."""

from normfuse.ops.define import Operator, no_axes

OPERATOR = Operator(
    "scaled_dot_product_attention",
    role="attention",
    kind="attention",
    source="Vaswani et al. 2017, arXiv 1706.03762",
    axes=no_axes,
    gain=None,
    shift=None,
    eps=None,
    row=False,
    factors=(),
)
