"""What a watch over weights sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import NormfuseError
from normfuse.weights.watch import Watch, samples_in_memory, samples_of_tensors
from tests.support import image
from tests.weights.ways import WAYS, model, other


def weights_of(module: nn.Module) -> tuple[torch.Tensor, ...]:
    return *module.parameters(), *module.buffers()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@torch.no_grad()
def test_every_ordinary_way_to_change_a_weight_is_seen(way: Callable[[Any], None]) -> None:
    given = model()
    watch = Watch(weights_of(given))
    assert watch.same(weights_of(given))
    given(image(2, 3, 6, 6))
    assert watch.same(weights_of(given)), "reading is no change"
    way(given)
    assert not watch.same(weights_of(given))


def test_swapped_tensors_are_seen() -> None:
    given = model()
    watch = Watch(weights_of(given))
    torch.utils.swap_tensors(given[0].weight, other()[0].weight)
    assert not watch.same(weights_of(given))


def test_a_way_past_the_samples_can_be_told() -> None:
    weight = torch.randn(64, 64)
    watch = Watch([weight])
    weight.data[20, 30] += 1
    assert watch.same((weight,)), "four numbers of 4096 are looked at"
    torch.autograd.graph.increment_version(weight)
    assert not watch.same((weight,))


@pytest.mark.parametrize("samples", [samples_in_memory, samples_of_tensors])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 4, 5)])
def test_samples_of_any_dtype_shape_and_layout(samples: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(3)).abs() + 1).to(dtype)
    for weight in (base.clone(), base.mT.contiguous().mT if base.dim() > 1 else base.clone(), torch.stack([base, base])[1]):
        same = samples([weight])
        assert same()
        weight.copy_(~weight if dtype == torch.bool else 2 * weight)
        assert not same()


@pytest.mark.parametrize("samples", [samples_in_memory, samples_of_tensors])
def test_not_a_number_is_no_change(samples: Any) -> None:
    assert samples([torch.full((9,), torch.nan), torch.zeros(3)])()


@torch.inference_mode()
def test_weights_of_inference_mode_are_watched_too() -> None:
    weight, buffer = torch.randn(3, 4), torch.randn(2)
    watch = Watch([weight, buffer])
    assert watch.same((weight, buffer))
    weight.mul_(2)
    assert not watch.same((weight, buffer))


def test_hooks_of_the_caller_do_not_blind_the_watch() -> None:
    weight = torch.randn(64, 64)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        watch = Watch([weight])
    weight[20, 30] += 1
    assert not watch.same((weight,))


def test_weights_without_memory_are_refused() -> None:
    with pytest.raises(NormfuseError, match="no plain memory"):
        Watch([torch.eye(3).to_sparse()])
