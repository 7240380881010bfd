"""Which sizes of the inputs may vary: what is tried, in which order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

Shapes = Any


CAUTIONS = 3
"""How many ways `"auto"` has: every size free, only the batch, none."""


Attempt = tuple[str, tuple[Any, ...], dict[str, Any], Shapes]


def attempts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes, parameters: inspect.Signature | None
) -> Iterator[Attempt]:
    if shapes is None:
        yield "", args, kwargs, None
        return
    if shapes != "auto":
        yield "", args, kwargs, _by_name(shapes, args, kwargs, parameters)
        return
    two_args, two_kwargs = at_least_two(args, kwargs)
    yield "", two_args, two_kwargs, auto(model, two_args, two_kwargs, lambda t: range(t.dim() if t.dim() < 4 else 1))
    yield "only the batch size may vary", two_args, two_kwargs, auto(model, two_args, two_kwargs, lambda t: range(1))
    yield "all sizes are fixed", args, kwargs, None


def _by_name(shapes: Shapes, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Any) -> Shapes:
    """A tuple of specifications follows the user's positional order, but inputs are passed by name here."""
    if isinstance(shapes, tuple | list) and not args:
        return dict(zip(kwargs, shapes, strict=False))
    return shapes


def at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The exporter specialises to an example batch of 1; two copies of the batch keep it free."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return args, kwargs
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() > 0 else t, (args, kwargs))


def auto(model: nn.Module, args: Any, kwargs: Any, free: Callable[[Tensor], range]) -> Shapes:
    collection = ShapesCollection()
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            collection[tensor] = {axis: Dim.AUTO for axis in free(tensor) if tensor.shape[axis] > 1}
    return collection.dynamic_shapes(model, args, kwargs)
