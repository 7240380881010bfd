"""Do the rows by which attention mixes values sum to exactly one, whatever the input? Only then does a shift pass it.

A softmax does, unless something is done to its result. The fused operator gives a row that may see nothing no weight at
all, so its mask must leave every row something: no mask, the causal one, an additive one that is finite by its bounds,
or one that depends on no input and whose values say so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from normfuse.analysis.row_functions import over_last
from normfuse.evaluate.rows import Weights
from normfuse.graph.node import argument, arguments, aten, is_op, op_name, operand, same_size, shape, site, value
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.graph.walk import tensors_behind
from normfuse.ops import operator_of
from normfuse.ops.traits import Trait, is_a

Bounds = tuple[float, float]
_VIEWS = Trait.WHOLE | Trait.EXPAND | Trait.PART | Trait.COPY
_TABLES = (aten.embedding, aten.index, aten.index_select, aten.gather)
_SUMS = (aten.add, aten.sub)


def why_not_one(program: Program, mix: fx.Node) -> str | None:
    """Why the rows of probabilities at `mix` (attention, or their product with the values) may not sum to one."""
    if not is_op(mix, aten.scaled_dot_product_attention):
        return _why_no_softmax(mix.args[0], mix)
    if argument(mix, "dropout_p") != 0:
        return "dropout is on: the probabilities that are left do not sum to one"
    mask = argument(mix, "attn_mask")
    if mask is None or _is_finite(program, mask) or _some_key_is_left(program, mask):
        return None
    return "a row of the mask may leave nothing to see, and its probabilities are zero"


def _why_no_softmax(node: object, mix: fx.Node) -> str | None:
    """From the product with the values back to the softmax over the axis that is summed."""
    while isinstance(node, fx.Node) and (_keeps_rows(node) or _is_float_cast(node)):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return f"nothing says that the rows at {site(mix)} sum to one"
    record = operator_of(node.target)
    if record is None or not record.sums_to_one:
        return f"{op_name(node)} at {site(node)} stands between the softmax and the values"
    return None if over_last(node) else f"the softmax at {site(node)} runs over another axis"


def _keeps_rows(node: fx.Node) -> bool:
    if is_op(node, aten.dropout):
        return argument(node, "train") is False
    if is_a(node, Trait.COPY):
        return True
    if not is_a(node, Trait.RESHAPE | Trait.EXPAND):
        return False
    before, after = shape(operand(node))[-1], shape(node)[-1]
    return same_size(before, after) and not same_size(before, 1)


def _is_float_cast(node: fx.Node) -> bool:
    return is_op(node, aten.to, aten._to_copy) and value(node.args[0]).is_floating_point()


# -- masks


def _is_finite(program: Program, mask: fx.Node) -> bool:
    """Are all values of an additive mask finite for every input?"""
    return value(mask).is_floating_point() and bounds(program, mask) is not None


def bounds(program: Program, item: object, depth: int = 32) -> Bounds | None:
    """Between which finite numbers all values lie, where the graph shows it.

    Of a parameter (a learned bias by position) it is taken that it stays below half of what its dtype can say.
    """
    if isinstance(item, bool | int | float):
        return (float(item), float(item)) if math.isfinite(item) else None
    if not isinstance(item, fx.Node) or not isinstance(value(item), Tensor) or depth == 0:
        return None
    if value(item).dtype == torch.bool:
        return (0.0, 1.0)
    if item.op == "get_attr" and program.origins[str(item.target)].kind == "parameter":
        most = torch.finfo(value(item).dtype).max / 2
        return (-most, most)
    found = _bounds(program, item, depth - 1) if item.op == "call_function" else None
    if found is None or not value(item).is_floating_point():
        return found
    return found if max(map(abs, found)) <= torch.finfo(value(item).dtype).max else None


def _bounds(program: Program, node: fx.Node, depth: int) -> Bounds | None:
    given = arguments(node)
    if is_a(node, _VIEWS) or is_op(node, *_TABLES, aten.to, aten._to_copy):
        return bounds(program, node.args[0], depth)
    if is_op(node, aten.zeros, aten.zeros_like, aten.new_zeros):
        return (0.0, 0.0)
    if is_op(node, aten.ones, aten.ones_like, aten.new_ones):
        return (1.0, 1.0)
    if is_op(node, aten.full, aten.full_like, aten.new_full):
        return bounds(program, given["fill_value"], depth)
    if is_op(node, aten.scalar_tensor):
        return bounds(program, given["s"], depth)
    if is_op(node, aten.where, aten.masked_fill):
        pair = ("self", "other") if is_op(node, aten.where) else ("self", "value")
        a, b = (bounds(program, given[name], depth) for name in pair)
        return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))
    return _of_arithmetic(program, node, depth) if is_op(node, *_SUMS, aten.rsub, aten.mul) else None


def _of_arithmetic(program: Program, node: fx.Node, depth: int) -> Bounds | None:
    given = arguments(node)
    a, b = bounds(program, given["self"], depth), bounds(program, given["other"], depth)
    if a is None or b is None:
        return None
    if is_op(node, aten.mul):
        corners = [x * y for x in a for y in b]
        return min(corners), max(corners)
    alpha = float(given.get("alpha", 1))
    if is_op(node, aten.rsub):
        a, b = b, a
    factor = alpha if is_op(node, aten.add) else -alpha
    scaled = sorted(factor * x for x in b)
    return a[0] + scaled[0], a[1] + scaled[1]


def _some_key_is_left(program: Program, mask: fx.Node) -> bool:
    """A mask that no input and no checkpoint changes, looked at."""
    if mask not in constants(program) or _depends_on_checkpoint(program, mask):
        return False
    table: Tensor = Weights(program).whole(mask)
    seen = table if table.dtype == torch.bool else table > -math.inf
    return bool(seen.any(-1).all())


def _depends_on_checkpoint(program: Program, mask: fx.Node) -> bool:
    origins = [program.origins[str(node.target)] for node in tensors_behind(mask)]
    return any(origin.kind != "constant" and origin.persistent for origin in origins)
