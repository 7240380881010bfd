"""An attention over a single key: its softmax is one whatever the scores, so that there is nothing to raise.

The inventory counts it for what it is: at another size of the input it is an attention like any other.
"""

from __future__ import annotations

from itertools import islice

from torch import Tensor, fx

from normfuse.graph.node import argument, aten, is_one, is_op, positive_axis, rank, readers, shape, value
from normfuse.graph.walk import nearest
from normfuse.recognise.attention.labels import Product, is_look, product_of

_STEPS = 24
_BETWEEN = (
    aten.mul, aten.div, aten.add, aten.sub, aten.masked_fill, aten.where, aten.neg, aten.max, aten.maximum, aten.clamp,
)  # fmt: skip


def is_over_one_key(node: fx.Node) -> bool:
    """Does the softmax stand between two products, with one entry along its axis?"""
    if not is_op(node, aten.softmax) or not is_one(shape(node)[positive_axis(argument(node, "dim"), rank(node))]):
        return False
    after = _product_ahead(node)
    if after is None:
        return False
    product, probabilities = after
    letters = product.letters_a if product.a is probabilities else product.letters_b
    sums_keys_alone = all(letter in product.letters_out for letter in letters if letter is not None)
    return sums_keys_alone and _product_behind(node.args[0]) is not None


def _product_ahead(node: fx.Node) -> tuple[Product, fx.Node] | None:
    for _ in range(_STEPS):
        users = readers(node)
        if len(users) != 1:
            return None
        product = product_of(users[0])
        if product is not None:
            return product, node
        if not is_look(users[0]):
            return None
        node = users[0]
    return None


def _product_behind(node: object) -> Product | None:
    """Along scales, masks and looks, not far."""
    if not isinstance(node, fx.Node):
        return None

    def step(current: fx.Node) -> list[fx.Node]:
        return current.all_input_nodes if is_look(current) or is_op(current, *_BETWEEN) else []

    tensors = (n for n in islice(nearest([node], step), _STEPS) if isinstance(value(n), Tensor))
    return next((product for n in tensors if (product := product_of(n)) is not None), None)
