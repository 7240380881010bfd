"""Low-rank adapters (LoRA) that were trained before a rewrite, carried over it.

A rewrite replaces a weight W by program(W). Where the program is linear in W, program(W + B A) - program(W) = B' A' has
the same rank: what the program does to rows it does to B, what it does to columns to A, and the product is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from normfuse.errors import NormfuseError
from normfuse.evaluate.rows import Weights
from normfuse.graph.node import argument, aten, is_op, op_name, value
from normfuse.graph.program import Program
from normfuse.ops.traits import Trait, is_a
from normfuse.weights.program import WeightProgram
from normfuse.weights.replay import checkpoint_tensors, replay


@dataclass(frozen=True)
class Adapter:
    """What is added to a weight: b (rows of the weight, rank) times a (rank, its other axes), any scale in one of them.

    In the weight's own layout: (out, in) of a linear, (out, in, taps) of a convolution, (words, channels) of a table.
    """

    a: Tensor
    b: Tensor

    @property
    def delta(self) -> Tensor:
        return torch.tensordot(self.b, self.a, 1)


class _Refused(Exception):
    pass


Low = tuple[Tensor, Tensor]
"""left (own axes, rank) and right (rank, own axes): together the axes of what they are added to, in this order."""


def carry(
    ledger: Mapping[str, WeightProgram], state_dict: Mapping[str, Tensor], adapters: Mapping[str, Adapter]
) -> dict[str, Adapter | Tensor]:
    """The adapters of the new parameters: an `Adapter` for a matrix, the whole difference for a vector.

    `ledger` is `report.weights`, `state_dict` the checkpoint that the adapters (by parameter) were trained on. Each also
    stays under its own name, for where the model still reads the parameter itself. Raises `NormfuseError` where a new
    parameter is no linear function of an adapted one.
    """
    for name, adapter in adapters.items():
        _check(name, adapter, state_dict)
    adapted = _adapted(ledger, state_dict, adapters)
    found: dict[str, Adapter | Tensor] = dict(adapters)
    for name, program in ledger.items():
        mine = {source: adapters[key] for source in program.sources if (key := _key(program, source, adapters))}
        if not mine:
            continue
        if value(program.node).dim() < 2:
            before, after = (replay({name: program}, tensors)[name] for tensors in (state_dict, adapted))
            found[name] = after - before
            continue
        with torch.no_grad():
            found[name] = _carried(name, program, checkpoint_tensors(program, state_dict), mine)
    return found


def _adapted(
    ledger: Mapping[str, WeightProgram], state_dict: Mapping[str, Tensor], adapters: Mapping[str, Adapter]
) -> dict[str, Tensor]:
    """The checkpoint with the adapters in it, under every name of a tied tensor."""
    origins = [o.names for program in _programs(ledger) for o in program.origins.values()]
    found = dict(state_dict)
    for name, adapter in adapters.items():
        known_as = next((names for names in origins if name in names), (name,))
        if len(both := [other for other in known_as if other in adapters]) > 1:
            raise NormfuseError(f"{' and '.join(map(repr, both))} are one tensor: give it one adapter")
        changed = state_dict[name] + adapter.delta.to(state_dict[name])
        found |= {other: changed for other in known_as if other in state_dict}
    return found


def _programs(ledger: Mapping[str, WeightProgram]) -> list[Program]:
    return list({id(weight.program): weight.program for weight in ledger.values()}.values())


def _check(name: str, adapter: Adapter, state_dict: Mapping[str, Tensor]) -> None:
    if name not in state_dict:
        raise NormfuseError(f"the checkpoint has no {name!r}, which an adapter is for")
    expected, given = list(state_dict[name].shape), [*adapter.b.shape[:-1], *adapter.a.shape[1:]]
    if given != expected or adapter.a.shape[0] != adapter.b.shape[-1]:
        raise NormfuseError(f"the adapter of {name!r} is {list(adapter.b.shape)} x {list(adapter.a.shape)}, not {expected}")


def _key(weight: WeightProgram, source: str, adapters: Mapping[str, Adapter]) -> str | None:
    return next((name for name in weight.program.origins[source].names if name in adapters), None)


def _carried(name: str, weight: WeightProgram, tensors: dict[str, Tensor], mine: Mapping[str, Adapter]) -> Adapter:
    try:
        low = _Carrier(Weights(weight.program, tensors), mine).low(weight.node)
    except _Refused as refused:
        raise NormfuseError(f"{name!r} is no linear function of {', '.join(mine)}: {refused}") from None
    assert low is not None
    dtype = next(iter(mine.values())).a.dtype
    return Adapter(low[1].to(dtype), low[0].to(dtype))


class _Carrier:
    """`low(node)`: the change of a node of a weight program as two factors; None where it does not change."""

    def __init__(self, weights: Weights, adapters: Mapping[str, Adapter]) -> None:
        self.weights = weights
        self.adapters = adapters
        self._known: dict[fx.Node, Low | None] = {}

    def low(self, node: fx.Node) -> Low | None:
        for current in self.weights._needed(node):
            if current not in self._known:
                self._known[current] = self._of(current)
        return self._known[node]

    def _of(self, node: fx.Node) -> Low | None:
        if node.op == "get_attr":
            adapter = self.adapters.get(str(node.target))
            return None if adapter is None else (adapter.b.double(), adapter.a.double())
        if all(self._known[n] is None for n in node.all_input_nodes):
            return None
        rule = _rule_of(node)
        if rule is None:
            raise _Refused(f"{op_name(node)} of it")
        return rule(self, node)

    def change(self, item: Any) -> Low | None:
        return self._known[item] if isinstance(item, fx.Node) else None

    def number(self, item: Any) -> Any:
        """A value that does not change."""
        if isinstance(item, fx.Node):
            if self._known[item] is not None:
                raise _Refused("it is multiplied by something that depends on it")
            return self.weights.whole(item)
        return item


def _sizes(node: fx.Node) -> list[int]:
    return [int(s) for s in value(node).shape]


def _same(c: _Carrier, node: fx.Node) -> Low | None:
    return c.change(node.args[0])


def _negated(c: _Carrier, node: fx.Node) -> Low:
    left, right = cast("Low", c.change(node.args[0]))
    return -left, right


def _product(c: _Carrier, node: fx.Node) -> Low:
    """Times something that varies along one side alone."""
    a, b = argument(node, "self"), argument(node, "other")
    if c.change(a) is None and is_op(node, aten.mul):
        a, b = b, a
    low = c.change(a)
    if low is None or argument(node, "self") is argument(node, "other"):
        raise _Refused("it is divided by, or multiplied by itself")
    factor = torch.as_tensor(c.number(b), dtype=torch.float64)
    factor = 1 / factor if is_op(node, aten.div) else factor
    left, right = _widened(low, _sizes(node))
    factor = factor.reshape([1] * (len(_sizes(node)) - factor.dim()) + list(factor.shape))
    own = left.dim() - 1
    if all(s == 1 for s in factor.shape[own:]):
        return left * factor.reshape([*factor.shape[:own], 1]), right
    if all(s == 1 for s in factor.shape[:own]):
        return left, right * factor.reshape([1, *factor.shape[own:]])
    raise _Refused("it is multiplied by a whole matrix, number by number")


def _widened(low: Low, sizes: list[int]) -> Low:
    """Broadcast to these sizes."""
    left, right = low
    own = left.dim() - 1
    missing = len(sizes) - own - (right.dim() - 1)
    left = left.reshape([1] * missing + list(left.shape))
    own += missing
    return left.expand([*sizes[:own], left.shape[-1]]), right.expand([right.shape[0], *sizes[own:]])


def _together(parts: list[Low], factors: Sequence[float] | None = None) -> Low:
    """The sum; changes of one adapter that share a factor add in the other."""
    first, *others = factors or [1.0] * len(parts)
    left, right = parts[0][0] * first, parts[0][1]
    for (l2, r2), factor in zip(parts[1:], others, strict=True):
        if l2.dim() != left.dim():
            raise _Refused("changes of its rows meet changes of its columns")
        if right.shape == r2.shape and torch.equal(right, r2):
            left = left + factor * l2
        elif left.shape == l2.shape and torch.equal(left, l2):
            right = right + factor * r2
        else:
            left, right = torch.cat([left, factor * l2], -1), torch.cat([right, r2], 0)
    return left, right


def _sum(c: _Carrier, node: fx.Node) -> Low:
    alpha = float(argument(node, "alpha") or 1) * (-1 if is_op(node, aten.sub) else 1)
    changes = [(c.change(argument(node, name)), factor) for name, factor in (("self", 1.0), ("other", alpha))]
    parts = [(_widened(low, _sizes(node)), factor) for low, factor in changes if low is not None]
    return _together([low for low, _ in parts], [factor for _, factor in parts])


def _reshaped(c: _Carrier, node: fx.Node) -> Low:
    left, right = cast("Low", c.change(node.args[0]))
    sizes, rows = _sizes(node), math.prod(left.shape[:-1])
    own = next((i for i in range(1, len(sizes) + 1) if math.prod(sizes[:i]) == rows), None)
    if own is None or (own == len(sizes) and right[0].numel() > 1):
        raise _Refused("its rows and columns are mixed by a reshape")
    return left.reshape([*sizes[:own], -1]), right.reshape([-1, *sizes[own:]])


def _permuted(c: _Carrier, node: fx.Node) -> Low:
    low = cast("Low", c.change(node.args[0]))
    count, own = len(_sizes(node)), low[0].dim() - 1
    return _in_order(low, [d % count for d in argument(node, "dims")], own)


def _in_order(low: Low, order: list[int], own: int) -> Low:
    left, right = low
    first = [d < own for d in order]
    if first == sorted(first, reverse=True):
        return left.permute([*order[:own], own]), right.permute([0, *(d - own + 1 for d in order[own:])])
    if first == sorted(first):
        split = len(order) - own
        return right.permute([*(d - own + 1 for d in order[:split]), 0]), left.permute([own, *order[split:]])
    raise _Refused("its axes are mixed by a permutation")


def _along(c: _Carrier, node: fx.Node, do: Callable[[Tensor, int], Tensor]) -> Low:
    """One operator along one axis, done to the factor that has the axis."""
    left, right = cast("Low", c.change(node.args[0]))
    own = left.dim() - 1
    axis = int(argument(node, "dim")) % (own + right.dim() - 1)
    return (do(left, axis), right) if axis < own else (left, do(right, axis - own + 1))


def _sliced(c: _Carrier, node: fx.Node) -> Low:
    rest = [argument(node, name) for name in ("start", "end", "step")]
    return _along(c, node, lambda part, axis: aten.slice.Tensor(part, axis, *rest))


def _selected(c: _Carrier, node: fx.Node) -> Low:
    index = c.number(argument(node, "index"))
    return _along(c, node, lambda part, axis: part.index_select(axis, index))


def _reduced(c: _Carrier, node: fx.Node) -> Low:
    left, right = cast("Low", c.change(node.args[0]))
    own, keep = left.dim() - 1, bool(argument(node, "keepdim"))
    axes = sorted((int(d) % (own + right.dim() - 1) for d in argument(node, "dim")), reverse=True)
    for axis in axes:
        do = torch.mean if is_op(node, aten.mean) else torch.sum
        left, right = (do(left, axis, keep), right) if axis < own else (left, do(right, axis - own + 1, keep))
    return left, right


def _matmul(c: _Carrier, node: fx.Node) -> Low:
    a, b = node.args[:2]
    first, second = c.change(a), c.change(b)
    if first is not None and second is not None:
        raise _Refused("two adapted weights are multiplied with each other")
    if first is not None:
        matrix = c.number(b)
        if matrix.dim() > 2 or first[1].dim() < 2:
            raise _Refused("each of its rows is multiplied by a matrix of its own")
        return first[0], first[1] @ matrix
    left, right = cast("Low", second)
    matrix = c.number(a)
    if right.dim() == 2:
        return matrix @ left, right
    if matrix.dim() == 2 and right.dim() > 2:
        return left, matrix @ right
    raise _Refused("its rows are multiplied by matrices of their own")


def _cat(c: _Carrier, node: fx.Node) -> Low:
    parts = cast("list[fx.Node]", node.args[0])
    axis = int(argument(node, "dim")) % len(_sizes(node))
    starts = [sum(_sizes(p)[axis] for p in parts[:i]) for i in range(len(parts))]
    placed = [
        _placed(low, axis, _sizes(node)[axis], torch.arange(start, start + _sizes(part)[axis]))
        for part, start in zip(parts, starts, strict=True)
        if (low := c.change(part)) is not None
    ]
    return _together(placed)


def _placed(low: Low, axis: int, size: int, index: Tensor) -> Low:
    """Along `axis`, at `index` of so many places; zero elsewhere."""
    left, right = low
    own = left.dim() - 1
    part, at = (left, axis) if axis < own else (right, axis - own + 1)
    wide = part.new_zeros([size if i == at else s for i, s in enumerate(part.shape)]).index_copy(at, index, part)
    return (wide, right) if axis < own else (left, wide)


def _copied(c: _Carrier, node: fx.Node) -> Low:
    index, axis = c.number(argument(node, "index")), int(argument(node, "dim")) % len(_sizes(node))
    parts: list[Low] = []
    if (low := c.change(argument(node, "self"))) is not None:
        own = low[0].dim() - 1
        left, right = low
        rows = axis < own
        kept = (left if rows else right).index_fill(axis if rows else axis - own + 1, index, 0)
        parts.append((kept, right) if rows else (left, kept))
    if (low := c.change(argument(node, "source"))) is not None:
        parts.append(_placed(low, axis, _sizes(node)[axis], index))
    return _together(parts)


def _padded(c: _Carrier, node: fx.Node) -> Low:
    left, right = cast("Low", c.change(node.args[0]))
    pads, columns = list(argument(node, "pad")), right.dim() - 1
    if argument(node, "value"):
        raise _Refused("something else is put around it")
    of_left = pads[2 * columns :]
    right = torch.nn.functional.pad(right, pads[: 2 * columns])
    return (torch.nn.functional.pad(left, [0, 0, *of_left]) if of_left else left), right


_Rule = Callable[[_Carrier, fx.Node], "Low | None"]
_BY_TRAIT: tuple[tuple[Trait, _Rule], ...] = (
    (Trait.CAST | Trait.COPY, _same),
    (Trait.RESHAPE, _reshaped),
    (Trait.PERMUTE, _permuted),
    (Trait.SLICE, _sliced),
)
_RULES: tuple[tuple[tuple[Any, ...], _Rule], ...] = (
    ((aten.neg,), _negated),
    ((aten.mul, aten.div), _product),
    ((aten.add, aten.sub), _sum),
    ((aten.index_select,), _selected),
    ((aten.mean, aten.sum), _reduced),
    ((aten.matmul, aten.mm), _matmul),
    ((aten.cat,), _cat),
    ((aten.index_copy,), _copied),
    ((aten.constant_pad_nd,), _padded),
)


def _rule_of(node: fx.Node) -> _Rule | None:
    by_trait = next((rule for trait, rule in _BY_TRAIT if is_a(node, trait)), None)
    return by_trait or next((rule for targets, rule in _RULES if is_op(node, *targets)), None)
