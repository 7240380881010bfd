"""Operators that do one thing to each channel: multiply it by a number of the model, and add a number to it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor, fx

from normfuse.graph.node import argument, arguments, aten, is_op, rank, same_size, shape, value

_COPIES = (aten.contiguous, aten.clone)


def channelwise_operand(node: fx.Node, weights: frozenset[fx.Node]) -> fx.Node | None:
    """The operand that `node` scales and shifts by numbers of the model, one per channel or one for all; else None."""
    if is_op(node, aten.batch_norm, aten.instance_norm):
        return argument(node, "input") if is_frozen_norm(node, weights) else None
    if is_op(node, aten.neg, *_COPIES) or _is_quiet(node):
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.to, aten._to_copy):
        source = node.args[0]
        floating = isinstance(value(source), Tensor) and value(source).is_floating_point()
        return source if floating else None  # type: ignore[return-value]
    if not is_op(node, aten.add, aten.sub, aten.rsub, aten.mul, aten.div):
        return None
    given = arguments(node)
    left, right = given["self"], given["other"]
    if given.get("rounding_mode") is not None:
        return None
    pairs = [(left, right)] if is_op(node, aten.div) else [(left, right), (right, left)]
    for x, constant in pairs:
        if isinstance(x, fx.Node) and x not in weights and as_large(x, node) and _per_channel(constant, node, weights):
            return x
    return None


def is_frozen_norm(node: fx.Node, weights: Set[fx.Node]) -> bool:
    """A BatchNorm or an InstanceNorm by running statistics of the model: an affine map of each channel."""
    if is_op(node, aten.batch_norm):
        by_input = argument(node, "training")
    else:
        by_input = not is_op(node, aten.instance_norm) or argument(node, "use_input_stats")
    if by_input or argument(node, "running_mean") is None or argument(node, "running_var") is None:
        return False
    given = (argument(node, name) for name in ("running_mean", "running_var", "weight", "bias"))
    return all(p in weights for p in given if p is not None)


def does(node: fx.Node, source: fx.Node) -> tuple[bool, bool]:
    """Does a channelwise sum or product scale its source, does it shift it?"""
    if not is_op(node, aten.add, aten.sub, aten.rsub):
        return True, False
    first = argument(node, "self") is source
    if is_op(node, aten.add):
        return not first and argument(node, "alpha") not in (None, 1), True
    return is_op(node, aten.rsub) or not first, True


def _is_quiet(node: fx.Node) -> bool:
    """Dropout at inference."""
    return is_op(node, aten.dropout, aten.feature_dropout) and argument(node, "train") is False


def constant_operand(node: fx.Node, source: fx.Node) -> Any:
    """What stands on the other side of a channelwise sum, product or quotient."""
    given = arguments(node)
    return given["other"] if given["self"] is source else given["self"]


def acts_on(node: fx.Node, source: fx.Node, weights: frozenset[fx.Node]) -> tuple[int | None, bool]:
    """The channel axis (None: every axis alike), and whether something is added."""
    if is_op(node, aten.batch_norm, aten.instance_norm):
        return 1, True
    if is_op(node, aten.neg, aten.to, aten._to_copy, *_COPIES) or _is_quiet(node):
        return None, False
    constant = constant_operand(node, source)
    long = [i for i, s in enumerate(shape(constant)) if s != 1] if isinstance(constant, fx.Node) else []
    axis = long[0] + rank(node) - rank(constant) if long else None
    return axis, is_op(node, aten.add, aten.sub, aten.rsub)


def _per_channel(constant: Any, node: fx.Node, weights: frozenset[fx.Node]) -> bool:
    if not isinstance(constant, fx.Node):
        return isinstance(constant, int | float) and not isinstance(constant, bool)
    if constant not in weights or not isinstance(value(constant), Tensor) or rank(constant) > rank(node):
        return False
    return sum(s != 1 for s in shape(constant)) <= 1


def as_large(x: fx.Node, node: fx.Node) -> bool:
    return rank(x) == rank(node) and all(same_size(a, b) for a, b in zip(shape(x), shape(node), strict=True))
