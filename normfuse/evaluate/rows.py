"""float64 values of weights, whole or by rows: what is large is never there twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.evaluate.promote import call, give_back, promote
from normfuse.graph.node import argument, arguments, aten, is_op, operand, shape
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.ops import operator_of
from normfuse.ops.traits import Trait, is_a

_LARGE = 1 << 18  # elements: weights above this are computed in blocks of rows


_KEEP = 1 << 16  # elements: computed weights below this are kept for their next reader


_SPENT = 1 << 22  # elements: after so much has been promoted, freed memory is given back


_ROWWISE_POINTWISE = (
    aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.rsqrt, aten.sqrt, aten.reciprocal, aten.square, aten.pow,
    aten.exp, aten.tanh, aten.erf, aten.clamp, aten.clamp_min, aten.to, aten._to_copy, aten.clone, aten.where, aten.abs,
)  # fmt: skip


_ROWWISE_MAPS = (aten.matmul, aten.mm)


_ROWWISE_REDUCTIONS = (aten.mean, aten.sum, aten.var, aten.std, aten.linalg_vector_norm, aten.amax)




_OVER_ROWS = (aten.mean, aten.sum, aten.amax)


class Weights:
    """float64 values of the parameter-only nodes of a program, whole or by rows."""

    def __init__(self, program: Program, tensors: dict[str, Tensor] | None = None) -> None:
        self.tensors = program.tensors if tensors is None else tensors
        self.nodes = constants(program)
        self._kept: dict[fx.Node, Any] = {}
        self._held: dict[fx.Node, Any] = {}
        self._by_row: dict[fx.Node, bool] = {}
        self._promoted = 0

    def _promote(self, tensor: Tensor) -> Tensor:
        """Count what is promoted: without this, freed blocks of a whole model pile up in the allocator."""
        self._promoted += tensor.numel()
        if self._promoted > _SPENT:
            self._promoted = 0
            give_back()
        return promote(tensor)  # type: ignore[no-any-return]

    def whole(self, node: fx.Node) -> Any:
        """The value of a parameter-only node; intermediate values live no longer than their last reader."""
        if node in self._kept:
            return self._kept[node]
        memo: dict[fx.Node, Any] = {}
        needed = self._needed(node)
        reads = {n: sum(1 for user in n.users if user in needed and n in self._inputs(user)) for n in needed}
        for current in needed:
            memo[current] = self._value(current, memo)
            for source in self._inputs(current):
                reads[source] -= 1
                if reads[source] == 0 and source is not node:
                    del memo[source]
        if isinstance(memo[node], Tensor) and memo[node].numel() <= _KEEP:
            self._kept[node] = memo[node]
        return memo[node]

    def _needed(self, root: fx.Node) -> dict[fx.Node, None]:
        """Everything the root depends on, inputs first."""
        order: dict[fx.Node, None] = {}
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order[node] = None
            elif node not in order:
                stack.append((node, True))
                stack.extend((n, False) for n in self._inputs(node) if n not in order)
        return order

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """What must be there in whole before the node."""
        return [] if self._reduces_rows(node) else node.all_input_nodes

    def _value(self, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._leaf(node)
        return self._over_rows(node) if self._reduces_rows(node) else self._apply(node, memo)

    def _leaf(self, node: fx.Node) -> Any:
        return self._promote(self.tensors[str(node.target)])

    def _apply(self, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), memo.__getitem__)
        return call(node, args, kwargs)

    # -- by rows

    def rowwise(self, node: fx.Node) -> bool:
        """Does each row (index along axis 0) of the value depend only on the same row of its sources?"""
        if node not in self._by_row:
            self._by_row[node] = self._is_rowwise(node)
        return self._by_row[node]

    def _is_rowwise(self, node: fx.Node) -> bool:
        sizes = shape(node)
        if node.op == "get_attr" or not sizes or node.op != "call_function":
            return node.op == "get_attr" and len(sizes) > 0
        if is_op(node, *_ROWWISE_POINTWISE):
            return any(self.rowwise(n) and self._has_rows(n, sizes) for n in node.all_input_nodes)
        if is_op(node, aten.constant_pad_nd):  # it makes its input larger, which may well be there in whole
            return len(argument(node, "pad")) < 2 * len(sizes)
        source = node.args[0]
        if not isinstance(source, fx.Node) or not self.rowwise(source):
            return False
        if is_a(node, Trait.RESHAPE):
            return shape(source)[0] == sizes[0]
        if len(shape(source)) < 2:
            return False
        if is_op(node, *_ROWWISE_REDUCTIONS):
            axes = [int(a) % len(shape(source)) for a in _axes(node)]
            return bool(axes) and 0 not in axes
        if is_op(node, *_ROWWISE_MAPS):
            right = node.args[1]
            return isinstance(right, fx.Node) and len(shape(right)) == 2
        record = operator_of(node.target)
        if record is not None and record.row and -len(sizes) not in record.axes_of(arguments(node), sizes):
            return all(not self._has_rows(n, sizes) for n in node.all_input_nodes[1:])
        return False

    def _reduces_rows(self, node: fx.Node) -> bool:
        """A reduction over the rows of what is large and has them one by one."""
        source = node.args[0] if node.args and is_op(node, *_OVER_ROWS) else None
        if not isinstance(source, fx.Node) or not shape(source) or not self.rowwise(source):
            return False
        axes = [int(a) % len(shape(source)) for a in _axes(node)]
        return 0 in axes and not node.kwargs and self._widest(source) > _LARGE

    def _over_rows(self, node: fx.Node) -> Tensor:
        source = operand(node)
        total: Tensor | None = None
        for _, block in self.blocks(source):
            part = call(node, (block, *node.args[1:]), {})
            if is_op(node, aten.amax):
                total = part if total is None else torch.maximum(total, part)
                continue
            part = part * (len(block) / int(shape(source)[0])) if is_op(node, aten.mean) else part
            total = part if total is None else total + part
        assert total is not None
        return total

    @staticmethod
    def _has_rows(node: fx.Node, sizes: Sequence[Any]) -> bool:
        own = shape(node)
        return len(own) == len(sizes) and own[0] != 1

    def rows(self, node: fx.Node, which: Any) -> Tensor:
        """Rows `which` (a slice or an index tensor) of a row-wise node."""
        if node.op == "get_attr":
            return self._promote(self.tensors[str(node.target)][which])
        sizes = shape(node)

        def fetch(n: fx.Node) -> Any:
            pointwise = is_op(node, *_ROWWISE_POINTWISE)
            if not (self._has_rows(n, sizes) if pointwise else n is node.args[0]):
                return self.whole(n)
            return self.rows(n, which) if self.rowwise(n) else self._hold(n)[which]

        if is_a(node, Trait.RESHAPE):
            block = fetch(operand(node))
            return block.reshape(len(block), *sizes[1:])
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fetch)
        return call(node, args, kwargs)  # type: ignore[no-any-return]

    def some_rows(self, node: fx.Node, which: Tensor) -> Tensor:
        """Rows of a row-wise node, and nothing kept of what they took."""
        outside, self._held = self._held, {}
        picked = self.rows(node, which)
        self._held = outside
        return picked

    def _hold(self, node: fx.Node) -> Tensor:
        """A value that has no rows of its own, for as long as the blocks of its readers last."""
        if node not in self._held:
            self._held[node] = self.whole(node)
        return self._held[node]  # type: ignore[no-any-return]

    def blocks(self, node: fx.Node) -> Iterator[tuple[slice, Tensor]]:
        """The value in blocks of rows, or in one piece where rows depend on each other."""
        sizes = shape(node)
        if not sizes or not all(isinstance(s, int) for s in sizes):
            yield slice(None), self.whole(node)
            return
        total = self._widest(node) if self.rowwise(node) else 0
        if total <= _LARGE:
            yield slice(None), self.whole(node)
            return
        step = max(1, _LARGE * int(sizes[0]) // total)
        outside, self._held = self._held, {}
        for start in range(0, int(sizes[0]), step):
            yield slice(start, start + step), self.rows(node, slice(start, start + step))
        self._held = outside

    def _widest(self, node: fx.Node) -> int:
        """Elements of the largest value by rows on the way to a row-wise node: a sum over a product is as wide as that."""
        widest, seen, stack = 0, {node}, [node]
        while stack:
            current = stack.pop()
            sizes = shape(current)
            if sizes and all(isinstance(s, int) for s in sizes):
                widest = max(widest, math.prod(int(s) for s in sizes))
            operands = [n for n in current.all_input_nodes if n not in seen and self.rowwise(n)]
            stack += operands
            seen.update(operands)
        return widest


def _axes(node: fx.Node) -> list[int]:
    axes = arguments(node).get("dim")
    return [axes] if isinstance(axes, int) else list(axes or [])


def resolve(structure: Any, env: dict[fx.Node, Any], weights: Weights) -> Any:
    return fx.map_arg(structure, lambda n: weights.whole(n) if n in weights.nodes else env[n])


def apply(node: fx.Node, envs: list[dict[fx.Node, Any]], weights: Weights) -> list[Any]:
    if is_op(node, aten.embedding) and operand(node) in weights.nodes and weights.rowwise(operand(node)):
        return [_embed(node, env, weights) for env in envs]
    if is_op(node, aten.linear) and _is_large(node.args[1], weights):
        return _linear_by_rows(node, envs, weights)
    shared = {n: weights.whole(n) for n in node.all_input_nodes if n in weights.nodes}
    results = []
    for env in envs:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n, env=env: shared[n] if n in shared else env[n])
        results.append(call(node, args, kwargs))
    return results


def _embed(node: fx.Node, env: dict[fx.Node, Any], weights: Weights) -> Tensor:
    index = resolve(node.args[1], env, weights)
    wanted, position = torch.unique(index, return_inverse=True)
    return weights.some_rows(operand(node), wanted)[position]


def _is_large(node: Any, weights: Weights) -> bool:
    if not isinstance(node, fx.Node) or node not in weights.nodes or not weights.rowwise(node):
        return False
    rows, columns = shape(node)[0], shape(node)[-1]
    return int(rows) * int(columns) > _LARGE


def _linear_by_rows(node: fx.Node, envs: list[dict[fx.Node, Any]], weights: Weights) -> list[Any]:
    """x @ W.T in blocks of W's rows."""
    weight = operand(node, 1)
    inputs = [resolve(node.args[0], env, weights) for env in envs]
    width = int(shape(weight)[0])
    results = [x.new_empty((*x.shape[:-1], width)) for x in inputs]
    for rows, block in weights.blocks(weight):
        for x, y in zip(inputs, results, strict=True):
            y[..., rows] = torch.nn.functional.linear(x, block)
    bias = argument(node, "bias")
    if bias is not None:
        results = [y + resolve(bias, env, weights) for y, env in zip(results, envs, strict=True)]
    return results
