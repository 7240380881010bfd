"""Sizes as numbers: a symbolic shape on small sizes of our own choosing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.evaluate.promote import in_float64, promote
from normfuse.graph.node import expression, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Role, Roles

_SMALL = (2, 3, 5, 4, 7, 6)
_HASHED = 1 << 14
_ENTRIES = 8


class Impossible(Exception):
    """A region that cannot be run here: its sizes cannot be chosen, an operator fails."""


class Concrete:
    """Numbers for the free sizes of a program, and the values of its fixed nodes at those sizes."""

    def __init__(self, program: Program, roles: Roles, *, small: bool = True, variant: int = 0) -> None:
        """`small`: sizes of our own, else those of the example; each `variant` of either has other sizes."""
        self.program = program
        self.roles = roles
        self.small = small
        self.variant = variant
        self._sizes: dict[Any, int] = {}
        self._symbols: dict[Any, int] = {}
        self._fixed: dict[fx.Node, Any] = {}

    def size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = expression(size)
        if expr.is_number:
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._choose(size, expr)
        return self._sizes[expr]

    def _choose(self, size: torch.SymInt, expr: Any) -> int:
        if not self.small:
            hint = size.node.hint
            if hint is None:
                raise Impossible("a size is not known")
            return int(hint) * (self.variant + 1)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._symbols:
                self._symbols[symbol] = self._in_range(str(symbol))
        chosen = expr.xreplace({s: self._symbols[s] for s in expr.free_symbols})
        if int(chosen) != chosen or int(chosen) < 2:
            raise Impossible("a size would vanish")
        return int(chosen)

    def _in_range(self, symbol: str) -> int:
        """A small size that the program takes, and not its least: there a slice up to a fixed position is still whole."""
        low, high = self.program.signature.ranges.get(symbol, (0, 2**62))
        small = _SMALL[(len(self._symbols) + 2 * self.variant) % len(_SMALL)] + self.variant
        return min(max(small, low + 1 + small if low > _SMALL[0] else low), high)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(int(self.size(s)) for s in shape(node))

    def fixed(self, node: fx.Node) -> Any:
        """The float64 value of a node that depends on sizes, literals and buffers alone."""
        if node in self._fixed:
            return self._fixed[node]
        result: Any
        if node.op == "get_attr":
            tensor = self.program.tensors[str(node.target)]
            if tensor.device.type == "meta":
                raise Impossible("a buffer is not known")
            result = promote(tensor)
        elif isinstance(value(node), torch.SymInt) and self.roles(node) is Role.SIZE:
            result = self.size(value(node))
        else:
            result = self._call(node)
        self._fixed[node] = result
        return result

    def _call(self, node: fx.Node) -> Any:
        def fetch(n: fx.Node) -> Any:
            if self.roles(n) is Role.ACTIVATION or self.roles(n) is Role.WEIGHT:
                val = value(n)  # it lends its shape alone
                if not isinstance(val, Tensor):
                    raise Impossible("a number of the input")
                return torch.zeros(self.shape(n), dtype=promote(val.dtype))
            return self.fixed(n)

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fetch)
        args, kwargs = pytree.tree_map(promote, (args, kwargs))
        args, kwargs = pytree.tree_map(self.size, (args, kwargs))
        with torch.no_grad():
            return in_float64(node.target, args, kwargs)

    def describe(self, node: fx.Node) -> Any:
        """What a region's function depends on in a side: the value of a fixed one, nothing of others."""
        role = self.roles(node)
        if role is Role.SIZE:
            return str(expression(value(node)))
        if role is not Role.FIXED:
            return None
        try:
            tensor = self.fixed(node)
        except Exception:
            return node.name
        if not isinstance(tensor, Tensor) or tensor.numel() > _HASHED:
            return node.name
        return hash(tensor.contiguous().cpu().numpy().tobytes())


class Excerpt(Concrete):
    """The same with the first few entries along each axis: enough for functions that work entry by entry."""

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(min(size, _ENTRIES) for size in super().shape(node))

    def fixed(self, node: fx.Node) -> Any:
        whole = super().fixed(node)
        return whole[(slice(_ENTRIES),) * whole.dim()] if isinstance(whole, Tensor) else whole
