"""Inputs for verification: the example, and further draws that the model must accept if it accepts the example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from normfuse.graph.signature import Leaf, Signature

Leaves = list[Any]
_IMAGE_RANK = 4
_LONGEST = 8  # a sequence of this length shows as much as a longer one and costs less memory


def draws(signature: Signature, example: Leaves, accepts: Callable[[Leaves], bool]) -> Iterator[Leaves]:
    """The example; then without end other values, at other (smaller) sizes where the signature and the model allow them."""
    yield example
    generator = torch.Generator().manual_seed(20_240_229)
    for trial in itertools.count(1):
        drawn = [_redraw(leaf, given, generator) for leaf, given in zip(signature.leaves, example, strict=True)]
        resized = _resized(signature, drawn, shrink=trial)
        yield resized if resized is not None and accepts(resized) else drawn


def _redraw(leaf: Leaf, given: Any, generator: torch.Generator) -> Any:
    """Values like the example's: floats of its mean and spread, integers of its range; masks and constants stay."""
    if not isinstance(given, Tensor) or given.numel() < 2:
        return given
    if given.dtype == torch.bool or given.is_complex():
        return given
    low, high = given.detach().amin(), given.detach().amax()
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)) or bool(low == high):
        return given
    if given.is_floating_point():
        wide = given.detach().double()
        noise = torch.randn(given.shape, generator=generator, dtype=torch.float64).to(given.device)
        return (noise * wide.std() + wide.mean()).to(given.dtype)
    if int(low) >= 0 and int(high) <= 1:
        return given
    drawn = torch.randint(int(low), int(high) + 1, tuple(given.shape), generator=generator)
    return drawn.to(given.dtype).to(given.device)


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
