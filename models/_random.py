"""Random values for all parameters and statistics: defaults (gain 1, bias 0, mean 0) hide most bugs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def randomized(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`make()` in eval mode with all values redrawn from `seed`; the global random state is as it was."""
    with torch.random.fork_rng(devices=[]):
        model = make()
    source, seen = torch.Generator().manual_seed(seed), set[int]()
    for owner in model.modules():
        for name, value in owner.named_parameters(recurse=False):
            if id(value) not in seen and not value.is_meta:  # a tied weight is drawn once, by its first owner
                value.data.copy_(_parameter(owner, name, value.detach().cpu(), source))
            seen.add(id(value))
        for name, value in owner.named_buffers(recurse=False):
            if not value.is_meta:
                value.copy_(_buffer(name, value.cpu(), source))
    return model.eval()


def normal(*shape: int, seed: int) -> Tensor:
    """A standard normal input."""
    return torch.randn(shape, generator=_inputs(seed), device="cpu")


def integers(high: int, *shape: int, seed: int) -> Tensor:
    """An input of token ids, class labels or timesteps, below `high`."""
    return torch.randint(high, shape, generator=_inputs(seed), device="cpu")


def _inputs(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 1_000_003)  # else an input repeats the first weight's noise


def _parameter(owner: nn.Module, name: str, old: Tensor, source: torch.Generator) -> Tensor:
    noise = torch.randn(old.shape, generator=source, device="cpu")
    if name.endswith("bias"):
        return 0.3 * noise
    if old.ndim == 1:  # gains and layer scales keep their centre, be it one or zero
        return old + 0.3 * noise
    if isinstance(owner, nn.Embedding) or not name.endswith("weight"):  # also class tokens, position tables
        return 0.25 + 0.5 * noise
    return noise / old[0].numel() ** 0.5  # by fan-in: keeps the second moment


def _buffer(name: str, old: Tensor, source: torch.Generator) -> Tensor:
    if name == "running_mean":
        return torch.randn(old.shape, generator=source, device="cpu")
    if name == "running_var":
        return 0.5 + 1.5 * torch.rand(old.shape, generator=source, device="cpu")
    return old + 100 if name == "num_batches_tracked" else old  # else a table: positions, masks
