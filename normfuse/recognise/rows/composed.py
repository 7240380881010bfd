"""Norms that are made of norms, told by how these are put together: AdaLIN and region norm."""

from __future__ import annotations

from torch import Tensor, fx

from normfuse.graph.node import argument, arguments, aten, is_op, rank, shape, value
from normfuse.ops.standardize import STANDARDIZE
from normfuse.ops.traits import Trait, is_a

_NORMS = Trait.GROUP_NORM | Trait.STORED_NORM | Trait.OWN_NORM
_FAR = 400
_NEAR = 48


def composed_kind(node: fx.Node) -> str | None:
    """`adalin`, `region_norm`, or none of them."""
    return "adalin" if _is_adalin(node) else "region_norm" if _is_region_norm(node) else None


def _is_adalin(node: fx.Node) -> bool:
    """r * instance_norm(x) + (1 - r) * layer_norm(x)"""
    if is_op(node, aten.lerp):
        one, two = (_scaled_norm(n) for n in node.args[:2])
    elif is_op(node, aten.add):
        one, two = (_scaled_norm(n) for n in node.args[:2])
        if one is not None and two is not None and not (_leaves(one[1]) & _leaves(two[1])):
            return False
    else:
        return False
    if one is None or two is None or one[0].args[0] is not two[0].args[0]:
        return False
    kinds = {_over(one[0]), _over(two[0])}
    return kinds == {"instance", "layer"}


def _scaled_norm(node: object) -> tuple[fx.Node, list[fx.Node]] | None:
    """(a norm, what it is multiplied by)"""
    factors: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if _over(node):
            weight = arguments(node).get("weight")
            return node, factors + ([weight] if isinstance(weight, fx.Node) else [])
        if not is_op(node, aten.mul) or len(node.all_input_nodes) != 2:
            return None
        norms = [n for n in node.all_input_nodes if _over(n) or is_op(n, aten.mul)]
        if len(norms) != 1:
            return None
        factors += [n for n in node.all_input_nodes if n is not norms[0]]
        node = norms[0]
    return None


def _over(node: fx.Node) -> str:
    """Is it a norm over each channel of an image, or over all of them?"""
    if rank(node) != 4 if isinstance(value(node), Tensor) else True:
        return ""
    if is_op(node, aten.instance_norm):
        return "instance"
    if is_op(node, aten.group_norm):
        groups = argument(node, "num_groups")
        return "layer" if groups == 1 else "instance" if groups == shape(node)[1] else ""
    axes: tuple[int, ...] = ()
    if is_op(node, aten.layer_norm):
        axes = tuple(range(-len(argument(node, "normalized_shape")), 0))
    elif is_op(node, STANDARDIZE) and argument(node, "centre"):
        axes = tuple(sorted(argument(node, "axes")))
    return "instance" if axes == (-2, -1) else "layer" if axes == (-3, -2, -1) else ""


def _leaves(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending and len(found) < _FAR:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return {n for n in found if not n.all_input_nodes}


def _is_region_norm(node: fx.Node) -> bool:
    """A norm of x inside of a mask, added to a norm of x outside of it."""
    if not is_op(node, aten.add) or len(node.all_input_nodes) != 2:
        return False
    one, two = (_masked_norm(n) for n in node.all_input_nodes)
    return any(x is y and (_is_rest(m, n) or _is_rest(n, m)) for x, m in one for y, n in two)


def _masked_norm(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(x, mask) for each product that a norm below `node` is of."""
    seen: set[fx.Node] = set()
    pending, found, has_norm = [node], [], False  # type: ignore[var-annotated]
    while pending and len(seen) < _NEAR:
        current = pending.pop(0)
        if current in seen:
            continue
        seen.add(current)
        has_norm = has_norm or is_a(current, _NORMS) or is_op(current, aten.rsqrt, aten.sqrt)
        if is_op(current, aten.mul) and len(current.all_input_nodes) == 2:
            one, two = current.all_input_nodes
            found += [(one, two), (two, one)]
        if not is_op(current, aten.conv2d, aten.linear):
            pending.extend(current.all_input_nodes)
    return found if has_norm else []


def _is_rest(mask: fx.Node, other: fx.Node) -> bool:
    """other == 1 - mask"""
    if is_op(other, aten.rsub):
        return other.args[0] is mask and arguments(other)["other"] in (1, 1.0)
    return is_op(other, aten.sub) and other.args[0] in (1, 1.0) and other.args[1] is mask
