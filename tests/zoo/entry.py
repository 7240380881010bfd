"""What a registry of the zoo holds, and how a model gets parameters that hide no bug."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Example = tuple[tuple[Any, ...], dict[str, Any]]

# Norms that multiply by (1 + weight): the weight itself is spread around zero.
_OFFSET_GAINS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P", "Qwen3NextRMSNorm")
_RUNNING = {"running_mean", "running_var"}


@dataclass(frozen=True)
class Entry:
    """One architecture: how to build it, how to call it, and what its authors' code does not allow."""

    name: str
    build: Callable[[], nn.Module]
    make_example: Callable[[int, int], Example]
    tags: frozenset[str]
    length: int = 8
    vary_length: bool = False
    exportable: bool = True
    # Why `torch.export` fails; or, where it works, why the length is fixed once captured with `Dim.AUTO`.
    reason: str = ""
    # Whether a capture with every dimension `Dim.AUTO` leaves the length free; the batch always is.
    free_length: bool = True
    # Whether such a capture takes more than five seconds (symbolic image sides through window moves).
    slow_dynamic: bool = False

    def example(self, batch: int = 2, length: int | None = None) -> Example:
        """(args, kwargs): the same tensors for the same sizes, whatever the global generator has seen."""
        return self.make_example(batch, self.length if length is None else length)


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """A CPU generator seeded by a name; the global one is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


def generator(*sizes: int) -> torch.Generator:
    """A generator of its own for example inputs."""
    return torch.Generator().manual_seed(zlib.crc32(repr(sizes).encode()))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Every parameter and every running statistic away from its default; call inside `seeded`."""
    done: set[int] = set()
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) not in done and value.is_floating_point():
                value.copy_(_draw(module, name, value))
                done.add(id(value))
        for name, value in module.named_buffers(recurse=False):
            if name in _RUNNING or _is_frozen_norm(module, name):
                value.copy_(_statistic(name, value))
    return model


def _draw(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(value)
    kind = type(module).__name__
    if "bias" in name or name == "beta":
        return 0.3 * noise
    if "Norm" in kind and value.ndim <= 1:
        return 0.3 * noise + (0.0 if kind in _OFFSET_GAINS else 1.0)
    if isinstance(module, nn.Embedding):
        return 0.5 * noise + 0.3
    if value.ndim <= 1 or name.endswith(("original0", "weight_g")):
        return _beside_default(value, noise)
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not name.startswith(("weight", "original")):
        return _free_parameter(value, noise)
    return noise / _fan_in(module, value) ** 0.5


def _beside_default(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gains, layer scales, log decays, temperatures: near the default, at a size that is seen in the output."""
    vanishing = value.abs().max() < 0.05
    return 0.5 + 0.3 * noise if vanishing else value * (1 + 0.2 * noise)


def _free_parameter(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens and positions (a leading 1) get a mean; anything else is a weight without a module of its own."""
    if value.shape[0] == 1 or value.shape[-2] == 1:
        return 0.5 * noise + 0.3
    return noise / value.shape[-1] ** 0.5


def _fan_in(module: nn.Module, value: torch.Tensor) -> int:
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps (in, out)
        return value.shape[0]
    return max(value[0].numel(), 1)


def _is_frozen_norm(module: nn.Module, name: str) -> bool:
    return "FrozenBatchNorm" in type(module).__name__ and name in {"weight", "bias"}


def _statistic(name: str, value: torch.Tensor) -> torch.Tensor:
    if name == "running_var":
        return 0.5 + 1.5 * torch.rand_like(value)
    return 0.5 * torch.randn_like(value) + (1.0 if name == "weight" else 0.0)
