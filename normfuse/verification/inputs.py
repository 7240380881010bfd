"""Inputs for verification: the example, and further draws that the model must accept if it accepts the example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from normfuse.graph.signature import Signature

Leaves = list[Any]
_IMAGE_RANK = 4
_LONGEST = 8  # a sequence of this length shows as much as a longer one and costs less memory
_IMAGE = (128, 96)  # halved five times, an image of this size still has a border and an inside


def excerpt(signature: Signature, example: Leaves) -> Leaves | None:
    """A part of the example that shows as much and costs less: a batch of two, a short sequence, a small image."""
    part = _resized(signature, example, shrink=0)
    return part if part is not None and 2 * _numel(part) <= _numel(example) else None


def least(signature: Signature, example: Leaves) -> Iterator[tuple[set[str], Leaves]]:
    """The free sizes that are few, and the example with so few: a sequence of one, then an empty batch."""
    short = _sizes(signature, example).keys() - _batch(signature) - _images(signature)
    if short:
        yield short, _with_sizes(signature, example, dict.fromkeys(short, 1))
    if len(batch := _batch(signature)) == 1:
        yield batch, _with_sizes(signature, example, dict.fromkeys(batch, 0))


def draws(signature: Signature, example: Leaves, accepts: Callable[[Leaves], bool]) -> Iterator[Leaves]:
    """The example; then other values, at other (smaller) sizes where the signature and the model allow them.

    Without end, unless the model takes no other values than the example's.
    """
    yield example
    generator = torch.Generator().manual_seed(20_240_229)
    bold = True
    for trial in itertools.count(1):
        drawn = [_redraw(given, generator) for given in example]
        if bold and (found := _flipped(signature, example, drawn, generator, trial, accepts)) is not None:
            yield found
        else:
            bold = False  # what the model refuses once it is not asked again
            found = next(filter(accepts, _plain_draws(signature, example, drawn, trial)), None)
            if found is None:
                return
            yield found


def _plain_draws(signature: Signature, example: Leaves, drawn: Leaves, trial: int) -> Iterator[Leaves]:
    """Other values at other sizes, at the example's, and with its integers where they are: the boldest first."""
    resized = _resized(signature, drawn, shrink=trial)
    if resized is not None:
        yield resized
    yield drawn
    pairs = zip(example, drawn, strict=True)
    floats = [d if isinstance(g, Tensor) and g.is_floating_point() else g for g, d in pairs]
    if any(one is not other for one, other in zip(floats, example, strict=True)):
        yield floats


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
    """Values like the example's: floats of its mean and spread, its integers in another order (a model may count them).

    What only `_flip` may vary stays.
    """
    if not isinstance(given, Tensor) or given.numel() == 0 or given.dtype == torch.bool or given.is_complex():
        return given
    low, high = given.detach().amin(), given.detach().amax()
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        return given
    if given.is_floating_point():
        return _floats(given.detach(), generator)
    if bool(low == high) or (int(low) >= 0 and int(high) <= 1):
        return given
    order = torch.randperm(given.numel(), generator=generator).to(given.device)
    drawn = given.detach().flatten()[order].reshape(given.shape)
    return drawn if not torch.equal(drawn, given) else given.detach().flatten().roll(1).reshape(given.shape)


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
    sizes = _sizes(signature, leaves)
    if not sizes:
        return None
    batch, images = _batch(signature), _images(signature)
    wanted: dict[str, int] = {}
    for name, size in sizes.items():
        if name in batch:
            wanted[name] = min(size, 2) if shrink == 0 else 1 if size > 1 else 2
        elif name in images:
            wanted[name] = min(size, _IMAGE[0] if shrink == 0 else _IMAGE[1])
        else:
            wanted[name] = min(size, max(2, min(_LONGEST, size) - shrink))
    return _with_sizes(signature, leaves, wanted)


def _with_sizes(signature: Signature, leaves: Leaves, wanted: Mapping[str, int]) -> Leaves:
    out: Leaves = []
    for leaf, given in zip(signature.leaves, leaves, strict=True):
        tensor = given
        for axis, name in enumerate(leaf.sizes):
            if isinstance(name, str) and name in wanted:
                size = wanted[name]
                tensor = torch.cat([tensor, tensor], axis) if size > tensor.shape[axis] else tensor
                tensor = tensor.narrow(axis, 0, size)
        out.append(tensor.contiguous() if isinstance(tensor, Tensor) else tensor)
    return out


def _sizes(signature: Signature, leaves: Leaves) -> dict[str, int]:
    return {
        name: given.shape[axis]
        for leaf, given in zip(signature.leaves, leaves, strict=True)
        for axis, name in enumerate(leaf.sizes) if isinstance(name, str)
    }  # fmt: skip


def _batch(signature: Signature) -> set[str]:
    return {first for leaf in signature.leaves if leaf.is_tensor and leaf.sizes and isinstance(first := leaf.sizes[0], str)}


def _images(signature: Signature) -> set[str]:
    """Free sizes that tensors of four and more dimensions alone have."""
    large = {n for leaf in signature.leaves if len(leaf.sizes) >= _IMAGE_RANK for n in leaf.sizes if isinstance(n, str)}
    return large - {n for leaf in signature.leaves if len(leaf.sizes) < _IMAGE_RANK for n in leaf.sizes}


def _numel(leaves: Leaves) -> int:
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
