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
    torch.testing.assert_close(fast(x)[0] if isinstance(fast(x), tuple) else fast(x), model(x))
    model[0].weight.data.mul_(2)
    torch.testing.assert_close(fast(x)[0] if isinstance(fast(x), tuple) else fast(x), model(x))


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
