"""Which sizes of the inputs may vary: what is tried, in which order, and why a size stays as it is."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Shapes = Any

IMAGE_RANK = 4
_MOST_MIXES = 8
"""Products over positions (attention) behind convolutions up to which free image sizes are captured in seconds."""
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_MIXES = frozenset({"scaled_dot_product_attention", "bmm", "baddbmm", "matmul", "__matmul__", "einsum"})
UNNAMED = "of an input of four and more dimensions, batch and length vary; dynamic_shapes lets others vary"
COSTLY = "windows or many attentions depend on it, capture would take minutes; dynamic_shapes lets it vary"


@dataclass(frozen=True)
class Attempt:
    """One way to export: inputs, which of their sizes may vary, and why the others may not."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Shapes
    reason: str = ""


def attempts(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Shapes,
    calls: Mapping[str, int],
) -> Iterator[Attempt]:
    """Ways to export the model, the freest first. `calls`: how often it calls which function of torch on the example."""
    if shapes is None:
        yield Attempt(args, kwargs, None, "dynamic_shapes=None")
        return
    if shapes != "auto":
        yield Attempt(args, kwargs, _by_name(shapes, args, kwargs), "dynamic_shapes does not free it")
        return
    images = bool(_CONVOLUTIONS & calls.keys())
    costly = images and ("roll" in calls or sum(calls[m] for m in _MIXES) > _MOST_MIXES)

    def every(tensor: Tensor) -> Sequence[int]:
        if tensor.dim() < IMAGE_RANK or (images and not costly):
            return range(tensor.dim())
        return (0,) if costly else (0, tensor.dim() - 2)  # of a cache, (batch, heads, length, channels), the length

    doubled = at_least_two(args, kwargs)
    for given in (doubled, (args, kwargs)) if doubled is not None else ((args, kwargs),):
        yield Attempt(*given, auto(model, *given, every), COSTLY if costly else "" if images else UNNAMED)
    given = doubled or (args, kwargs)
    yield Attempt(*given, auto(model, *given, lambda _: range(1)))
    yield Attempt(args, kwargs, None)


def _by_name(shapes: Shapes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """A tuple of specifications follows the user's positional order, but inputs are passed by name here."""
    if isinstance(shapes, tuple | list) and not args:
        return dict(zip(kwargs, shapes, strict=False))
    return shapes


def at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The exporter specialises to an example batch of 1; two copies of the batch keep it free. None: it is no 1."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return None
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() > 0 else t, (args, kwargs))


def auto(model: nn.Module, args: Any, kwargs: Any, free: Callable[[Tensor], Sequence[int]]) -> Shapes:
    """What `torch.export` is to be told: these axes of each tensor may vary, unless the example has one entry there."""
    collection = ShapesCollection()
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            collection[tensor] = {axis: Dim.AUTO for axis in free(tensor) if tensor.shape[axis] > 1}
    return collection.dynamic_shapes(model, args, kwargs)


@contextlib.contextmanager
def every_input_named(
    model: nn.Module, parameters: inspect.Signature | None, kwargs: Mapping[str, Any]
) -> Generator[None]:
    """What `forward` takes by `**kwargs` has a name while this lasts: the exporter gives sizes to named inputs alone."""
    known = parameters.parameters if parameters is not None else {}
    rest = [p for p in known.values() if p.kind is p.VAR_KEYWORD]
    further = [name for name in kwargs if name not in known]
    if not rest or not further:
        yield
        return
    own, missing = model.forward, object()
    before = model.__dict__.get("forward", missing)

    def forward(*args: Any, **given: Any) -> Any:
        return own(*args, **given)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in further]
    kept = [p for p in known.values() if p.kind is not p.VAR_KEYWORD]
    forward.__signature__ = inspect.Signature([*kept, *named])  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = before


class CallCounter(TorchFunctionMode):
    """How often each function of torch is called while this lasts; products of weights are not told from others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        flat = sum(1 for a in args[:2] if isinstance(a, Tensor) and a.dim() < 3)
        if name not in _MIXES or not flat:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))
