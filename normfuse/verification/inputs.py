"""Inputs for verification: the example, and further draws that the model must accept if it accepts the example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from normfuse.graph.signature import Signature

Leaves = list[Any]
_IMAGE_RANK = 4
_LONGEST = 8  # a sequence of this length shows as much as a longer one and costs less memory


def draws(signature: Signature, example: Leaves, accepts: Callable[[Leaves], bool]) -> Iterator[Leaves]:
    """The example; then without end other values, at other (smaller) sizes where the signature and the model allow them."""
    yield example
    generator = torch.Generator().manual_seed(20_240_229)
    bold = True
    for trial in itertools.count(1):
        drawn = [_redraw(given, generator) for given in example]
        resized = _resized(signature, drawn, shrink=trial)
        if bold and (found := _flipped(signature, example, drawn, generator, trial, accepts)) is not None:
            yield found
        else:
            bold = False  # what the model refuses once it is not asked again
            yield resized if resized is not None and accepts(resized) else drawn


def _flipped(
    signature: Signature,
    example: Leaves,
    drawn: Leaves,
    generator: torch.Generator,
    trial: int,
    accepts: Callable[[Leaves], bool],
) -> Leaves | None:
    """Other masks and other constant integers, where there are any and the model takes them."""
    if not any(_is_constant_integer(given) for given in example):
        return None
    flipped = [_flip(g, d, generator) for g, d in zip(example, drawn, strict=True)]
    resized = _resized(signature, flipped, shrink=trial)
    return next((leaves for leaves in (resized, flipped) if leaves is not None and accepts(leaves)), None)


def _redraw(given: Any, generator: torch.Generator) -> Any:
    """Values like the example's: floats of its mean and spread, integers of its range; what only `_flip` may vary stays."""
    if not isinstance(given, Tensor) or given.numel() == 0 or given.dtype == torch.bool or given.is_complex():
        return given
    low, high = given.detach().amin(), given.detach().amax()
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        return given
    if given.is_floating_point():
        return _floats(given.detach(), generator)
    if bool(low == high) or (int(low) >= 0 and int(high) <= 1):
        return given
    drawn = torch.randint(int(low), int(high) + 1, tuple(given.shape), generator=generator)
    return drawn.to(given.dtype).to(given.device)


def _floats(given: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the same mean and spread; round a constant its sign is kept, for it may be a scale or a variance."""
    wide = given.double()
    if bool(wide.amin() == wide.amax()) and bool(wide.amax() != 0):
        factors = 0.5 + torch.rand(given.shape, generator=generator, dtype=torch.float64).to(given.device)
        return (wide * factors).to(given.dtype)
    noise = torch.randn(given.shape, generator=generator, dtype=torch.float64).to(given.device)
    spread = wide.std() if bool(wide.amin() != wide.amax()) else 1.0
    return (noise * spread + wide.mean()).to(given.dtype)


def _is_constant_integer(given: Any) -> bool:
    """A mask of ones, ids of zeros: what people pass, and what shows nothing."""
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex() or given.numel() < 2:
        return False
    value = int(given.flatten()[0])
    # A table with one row has no row 1, and a device that is asked for it does not recover.
    return bool((given == value).all()) and value >= 0 and (value > 0 or given.dtype == torch.bool or given.is_cpu)


def _flip(given: Any, drawn: Any, generator: torch.Generator) -> Any:
    """A constant mask with another end (the first place of a row stays, so that something is seen), smaller constants."""
    if not _is_constant_integer(given):
        return drawn
    value = int(given.flatten()[0])
    if value > 1:
        return torch.randint(0, value + 1, tuple(given.shape), generator=generator).to(given.dtype).to(given.device)
    length = given.shape[-1]
    kept = torch.randint(1, length + 1, (*given.shape[:-1], 1), generator=generator)
    flipped = torch.where(torch.arange(length) < kept, value, 1 - value)
    return flipped.to(given.dtype).to(given.device)


def _resized(signature: Signature, leaves: Leaves, shrink: int) -> Leaves | None:
    """Other sizes wherever they are free: a batch of one (or two), any other size smaller (no table forbids that)."""
    free = {size for leaf in signature.leaves for size in leaf.sizes if isinstance(size, str)}
    if not free:
        return None
    batch = {leaf.sizes[0] for leaf in signature.leaves if leaf.is_tensor and leaf.sizes}
    out: Leaves = []
    for leaf, given in zip(signature.leaves, leaves, strict=True):
        tensor = given
        for axis, size in enumerate(leaf.sizes):
            if size not in free:
                continue
            if size in batch:
                tensor = tensor.narrow(axis, 0, 1) if tensor.shape[axis] > 1 else torch.cat([tensor, tensor], axis)
            elif tensor.shape[axis] > 2 and len(leaf.sizes) < _IMAGE_RANK:
                smaller = max(2, min(_LONGEST, tensor.shape[axis]) - shrink)
                tensor = tensor.narrow(axis, 0, min(smaller, tensor.shape[axis]))
        out.append(tensor.contiguous() if isinstance(tensor, Tensor) else tensor)
    return out
