"""What a registry of the zoo holds, and how a model gets parameters that hide no bug."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Example = tuple[tuple[Any, ...], dict[str, Any]]

# Norms that multiply by (1 + weight): the weight itself is spread around zero.
_OFFSET_GAINS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P", "Qwen3NextRMSNorm")


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
    # Whether such a capture takes many times as long as a static one (symbolic image sides cut into windows).
    slow_dynamic: bool = False
    # The smallest batch of such a capture: torch keeps a size that is a part of another one above 1.
    least_batch: int = 1

    def example(self, batch: int = 2, length: int | None = None) -> Example:
        """(args, kwargs): the same tensors for the same sizes, whatever the global generator has seen."""
        return self.make_example(batch, self.length if length is None else length)


@contextmanager
def seeded(name: str) -> Generator[None]:
    """A CPU generator seeded by a name; the global one is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


def generator(*sizes: int) -> torch.Generator:
    """A generator of its own for example inputs."""
    return torch.Generator().manual_seed(zlib.crc32(repr(sizes).encode()))


@torch.no_grad()
def randomise(model: nn.Module, example: Example) -> nn.Module:
    """Every parameter and every running statistic away from its default; call inside `seeded`.

    Batch statistics are near those of `example`, not drawn blindly: in a deep network the signal would
    vanish in the biases, and an output that does not depend on the input hides every bug.
    """
    done: set[int] = set()
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) not in done and value.is_floating_point() and value.numel():
                value.copy_(_draw(module, name, value))
                done.add(id(value))
        if "FrozenBatchNorm" in type(module).__name__:
            for name in ("weight", "bias"):
                value = module.get_buffer(name)
                value.copy_(_draw(module, name, value))
    _estimate_statistics(model, example)
    return model


def _estimate_statistics(model: nn.Module, example: Example) -> None:
    """The statistics of what each norm receives: off by half a standard deviation and by a factor of two."""
    norms = [each for each in model.modules() if torch.is_tensor(getattr(each, "running_var", None))]
    if not norms:
        return
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
    args, kwargs = example
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _set_statistics(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
    variance, mean = torch.var_mean(inputs[0], dim=axes, correction=0)
    running = dict(norm.named_buffers(recurse=False))
    floor = 0.1 * (variance + mean.square()).mean()  # a channel that is dead here may live elsewhere
    running["running_var"].copy_((variance + floor) * (0.5 + 1.5 * torch.rand_like(variance)))
    if "running_mean" in running:
        running["running_mean"].copy_(mean + 0.5 * variance.sqrt() * torch.randn_like(mean))


def _draw(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(value)
    if "bias" in name or name == "beta":
        return 0.3 * noise
    if isinstance(module, nn.Embedding):
        return 0.5 * noise + 0.3
    if type(module).__name__ in _OFFSET_GAINS:
        return 0.3 * noise
    if "Norm" in type(module).__name__ and value.ndim == 1:  # also those that timm starts at zero
        return 1 + 0.3 * noise
    if value.ndim <= 1 or name.endswith(("original0", "weight_g")) or _is_constant(value):
        return _beside_default(value, noise)
    if not name.startswith(("weight", "original")):
        return _free_parameter(value, noise)
    return noise / _fan_in(module, value) ** 0.5


def _is_constant(value: torch.Tensor) -> bool:
    return bool((value == value.flatten()[0]).all()) and value.flatten()[0].item() != 0


def _beside_default(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gains, layer scales, log decays, temperatures: near the default, but seen in the output."""
    vanishing = value.abs().max() < 0.05
    return 0.5 + 0.3 * noise if vanishing else value * (1 + 0.3 * noise)


def _free_parameter(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens and positions (a leading 1) get a mean; others are weights without a module."""
    if value.shape[0] == 1 or value.shape[-2] == 1:
        return 0.5 * noise + 0.3
    return noise / value.shape[-1] ** 0.5


def _fan_in(module: nn.Module, value: torch.Tensor) -> int:
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps (in, out)
        return value.shape[0]
    return max(value[0].numel(), 1)


def noise(*sizes: int) -> torch.Tensor:
    """Inputs with a mean and an offset per row: rows that are alike would be pooled to the same output."""
    draws = generator(*sizes)
    offsets = torch.randn((*sizes[:-1], 1) if len(sizes) < 3 else (*sizes[:-2], 1, 1), generator=draws)
    return torch.randn(sizes, generator=draws) + 0.5 * offsets + 0.3
