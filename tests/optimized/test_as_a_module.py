"""An optimized model as a module: moved, converted, beside the original whose weights it shares."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import NormfuseError
from tests.support import image, randomised


def model(seed: int = 0) -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)), seed)


def optimized(given: nn.Module, **options: Any) -> normfuse.Optimized:
    return normfuse.optimize(given, (image(2, 3, 8, 8),), verify=False, **options)


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float64)],
)
def test_another_dtype_is_refused_before_anything_is_converted(convert: Callable[[Any], Any]) -> None:
    given = optimized(model())
    before = given(image(2, 3, 8, 8))
    with pytest.raises(NormfuseError, match=r"keeps its dtype \(torch.float32\).*convert the original") as caught:
        convert(given)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(given(image(2, 3, 8, 8)), before, atol=0, rtol=0)


@pytest.mark.parametrize("move", [lambda m: m.float(), lambda m: m.cpu(), lambda m: m.to(memory_format=torch.channels_last)])
def test_the_same_dtype_is_no_conversion(move: Callable[[Any], Any]) -> None:
    given = optimized(model())
    torch.testing.assert_close(move(given)(image(2, 3, 8, 8)), model()(image(2, 3, 8, 8)))


def load(original: nn.Module) -> None:
    original.load_state_dict(model(7).state_dict())


def step(original: nn.Module) -> None:
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(1.5)


@pytest.mark.parametrize("change", [load, step])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_mixture_of_old_and_new_weights_is_told_once(change: Callable[[nn.Module], None], backend: str) -> None:
    original = model()
    given, x = optimized(original, backend=backend), image(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given(x)
    change(original)
    with pytest.warns(UserWarning, match="mixture of both; optimize again, or use optimize"):
        given(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given(x)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_copy_shares_nothing(backend: str) -> None:
    original, x = model(), image(2, 3, 8, 8)
    given = optimized(original, backend=backend, copy=True)
    before = given(x)
    torch.testing.assert_close(before, original(x))
    for change in (load, step):
        change(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(given(x), before, atol=0, rtol=0)


def test_tied_weights_are_copied_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.norm(x).relu() + self.one(x).relu())

    original = randomised(Tied())
    given = normfuse.optimize(original, (image(3, 4),), copy=True)
    own = {t.data_ptr() for t in given.tensors().values()}
    assert not own & {t.data_ptr() for t in original.parameters()}
    assert sum(t.numel() for t in given.parameters()) <= sum(t.numel() for t in original.parameters())


def test_weights_given_to_the_optimized_model_itself_are_no_mixture() -> None:
    original, x = model(), image(2, 3, 8, 8)
    given, other = optimized(original), optimized(model(7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given.load_state_dict(other.state_dict())
        torch.testing.assert_close(given(x), other(x))


def test_moved_weights_are_watched_no_more() -> None:
    original = model()
    given = optimized(original)
    given._apply(torch.clone)
    load(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(given(image(2, 3, 8, 8)), model()(image(2, 3, 8, 8)))
        copy.deepcopy(given)(image(2, 3, 8, 8))
