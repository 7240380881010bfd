"""`torch.compile(model, backend="normfuse")`, found by its entry point."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import normfuse
from normfuse.backend import normfuse_backend
from tests.support import image, randomised
from tests.weights.ways import WAYS
from tests.weights.ways import model as changing_model
from tests.zoo.hugging_face import HUGGING_FACE
from tests.zoo.test_hugging_face import close


def compiled(model: torch.nn.Module, below: str) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="normfuse", options={"below": below})  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama", "resnet"])
@pytest.mark.parametrize("below", ["torch", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_equal_outputs_also_at_another_batch_size(name: str, below: str) -> None:
    entry = HUGGING_FACE[name]
    model = entry.build()
    fast = compiled(model, below)
    for batch in (2, 3):
        args, kwargs = entry.example(batch)
        assert close(fast(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@torch.no_grad()
def test_weights_that_change_are_baked_anew(way: Callable[[Any], None]) -> None:
    model = changing_model()
    fast, x = compiled(model, "torch"), image(2, 3, 6, 6)
    before = model(x)
    torch.testing.assert_close(fast(x), before)
    way(model)
    assert not torch.allclose(model(x), before)
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_weights_in_the_graph_itself_are_watched() -> None:
    """As Dynamo gives them when it does not inline modules."""
    model = changing_model()
    module, x = torch.fx.symbolic_trace(model), image(2, 3, 6, 6)
    fast = normfuse_backend(module, [x], options={"below": "torch"})
    torch.testing.assert_close(fast(x)[0], model(x))
    model[0].weight.data.mul_(2)
    torch.testing.assert_close(fast(x)[0], model(x))


def test_gradients_are_left_alone() -> None:
    model = randomised(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.LayerNorm(4)))
    fast, x = compiled(model, "torch"), image(2, 6)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fast(x).sum().backward()
    assert any("torch.no_grad()" in str(w.message) for w in seen)
    assert model[0].weight.grad is not None


def test_unknown_options() -> None:
    model = randomised(torch.nn.Linear(6, 4))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="unknown option 'fast'"), torch.no_grad():
        torch.compile(model, backend="normfuse", options={"fast": True})(image(2, 6))


class Scaled(torch.nn.Module):
    """A number of its own, a norm with an eps, and a number that is an input: all of them inputs of a dynamic graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.scale = torch.nn.Linear(6, 4), torch.nn.LayerNorm(4, eps=0.3), 2.5

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return self.norm(self.linear(x)) * self.scale + t


@torch.no_grad()
def test_dynamic_graphs_are_optimized() -> None:
    model = randomised(Scaled())
    torch._dynamo.reset()
    fast = torch.compile(model, backend="normfuse", dynamic=True, options={"below": "torch"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (2, 3, 5):
            torch.testing.assert_close(fast(image(batch, 6), 1.5), model(image(batch, 6), 1.5))
    with pytest.warns(UserWarning, match="a number that is an input changes"):
        for t in (1.5, 2.5, 3.5):
            torch.testing.assert_close(fast(image(4, 6), t), model(image(4, 6), t))


class Rolled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(self.norm(self.conv(x)), 2, -1)


@torch.no_grad()
def test_a_size_that_capture_keeps_goes_to_what_stands_below() -> None:
    model = randomised(Rolled())
    torch._dynamo.reset()
    fast = torch.compile(model, backend="normfuse", dynamic=True, options={"below": "torch"})
    torch.testing.assert_close(fast(image(2, 3, 8, 8)), model(image(2, 3, 8, 8)))
    with pytest.warns(UserWarning, match="left to what stands below: .* is fixed at 8 and cannot be 9"):
        torch.testing.assert_close(fast(image(2, 3, 9, 9)), model(image(2, 3, 9, 9)))
    model.conv.weight.mul_(2)
    torch.testing.assert_close(fast(image(2, 3, 9, 9)), model(image(2, 3, 9, 9)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "fast"}, "unknown mode 'fast': the modes are default, .*reduce-overhead"),
        ({"options": {"mode": "max-autotune", "below": "torch"}}, "mode='max-autotune' is one of inductor's"),
        ({"options": {"below": "tvm"}}, 'choose "inductor" or "torch"'),
    ],
)
@torch.no_grad()
def test_modes_and_options_that_are_not_there(given: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(randomised(torch.nn.Linear(6, 4)), backend="normfuse", **given)(image(2, 6))


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"mode": "max-autotune-no-cudagraphs"}}])
@pytest.mark.parametrize("dynamic", [True, False, None])
@torch.no_grad()
def test_modes_of_inductor(given: dict[str, Any], dynamic: bool | None) -> None:
    model = changing_model()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="normfuse", dynamic=dynamic, **given)
    for sizes in ((2, 3, 8, 8), (3, 3, 9, 11), (2, 3, 8, 8)):
        torch.testing.assert_close(fast(image(*sizes)), model(image(*sizes)))
        model[0].weight.data.mul_(1.5)
        torch.testing.assert_close(fast(image(*sizes)), model(image(*sizes)))
        torch.testing.assert_close(fast(image(4, 3, 9, 10)), model(image(4, 3, 9, 10)))


@pytest.mark.slow
def test_no_import_of_normfuse_is_needed() -> None:
    code = (
        "import sys, torch; m = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.LayerNorm(4)).eval();"
        "assert 'normfuse' not in sys.modules; x = torch.randn(2, 6);"
        "f = torch.compile(m, backend='normfuse', options={'below': 'torch'});"
        "torch.set_grad_enabled(False); torch.testing.assert_close(f(x), m(x)); assert 'normfuse' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


assert normfuse
