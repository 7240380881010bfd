"""METHODS' table, lines on weights that are functions of parameters, and on whole networks (see test_methods_table)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normfuse
from tests.passes.test_bake_weights import Compander, Conditioned, trained
from tests.passes.test_methods_norms import worst
from tests.support import assert_same_function, image, operators, randomised
from tests.weights.test_weight_functions import TwoSided
from tests.zoo.entry import randomise, seeded

BAKE = "bake_weights"
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(6, 5), image(3, 6)),
    "conv": lambda: (nn.Conv2d(4, 6, 3), image(2, 4, 7, 7)),
    "transposed": lambda: (nn.ConvTranspose2d(4, 6, 3), image(2, 4, 5, 5)),
}


def rounded_once(model: nn.Module) -> Tensor:
    """The weight that the model's own code computes in float64, in float32: METHODS' bit-equal, with one rounding."""
    with torch.no_grad():
        for hook in model._forward_pre_hooks.values():
            hook(model, ())  # a weight that hangs on no graph can be copied
        wide = copy.deepcopy(model).double()
        for hook in wide._forward_pre_hooks.values():
            hook(wide, ())
        return wide.weight.detach().float()  # type: ignore[operator, return-value, union-attr]


# -- weight_norm


def hook_norm(module: nn.Module, dim: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module, dim=dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("api", ["hook", "parametrize"])
def test_weight_norm_goes_and_its_weight_is_bit_equal(api: str, dim: Any, layer: str) -> None:
    module, x = LAYERS[layer]()
    wrap = hook_norm if api == "hook" else parametrizations.weight_norm
    model = randomised(wrap(module, dim=dim))  # type: ignore[operator]
    expected, before = rounded_once(model), model(x)
    report = normfuse.optimize_(model, (x,), passes=[BAKE])
    assert report.fired == {BAKE: 1} and report.verification
    assert torch.equal(model.weight, expected)  # type: ignore[arg-type]
    assert not model._forward_pre_hooks and not parametrize.is_parametrized(model)
    assert torch.equal(model(x), model(x)) and worst(model(x), before) <= 1e-6


# -- spectral_norm


@pytest.mark.parametrize("layer", LAYERS)
def test_spectral_norm_is_bit_equal_and_its_vectors_stay(layer: str) -> None:
    """Three forwards of training: sigma is the estimate of the power iteration, whatever the largest singular value is."""
    module, x = LAYERS[layer]()
    model = trained(parametrizations.spectral_norm(randomised(module)), x)
    vectors = [b.clone() for b in model.buffers()]
    result = normfuse.optimize(model, (x,), passes=[BAKE])
    assert_same_function(result)
    assert any(torch.equal(t, rounded_once(model)) for t in result.tensors().values() if t.dim() > 1)
    assert vectors and all(torch.equal(a, b) for a, b in zip(vectors, model.buffers(), strict=True))


# -- generic parametrizations


@pytest.mark.parametrize("make", [Compander, Conditioned, TwoSided], ids=lambda make: make.__name__)
def test_any_parametrization_is_bit_equal(make: Callable[[], nn.Module]) -> None:
    layer = nn.Linear(5, 6, bias=False)
    parametrize.register_parametrization(layer, "weight", make(), unsafe=make is TwoSided)
    model = randomised(layer)
    result = normfuse.optimize(model, (image(3, model.weight.shape[1]),), passes=[BAKE])  # type: ignore[union-attr, index]
    assert_same_function(result)
    [weight] = result.tensors().values()
    assert torch.equal(weight, rounded_once(model))


# -- whole networks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "nfnet_f0"])
def test_convolutional_networks_hold_no_norm_and_are_the_same(name: str) -> None:
    from tests.zoo.torchvision_stub import import_timm

    args = (image(2, 3, 64, 64),)
    with seeded(name):
        model = randomise(import_timm().create_model(name).eval(), (args, {}))
    result = normfuse.optimize(model, args)
    assert_same_function(result)
    assert "batch_norm" not in operators(result)
    with torch.no_grad():
        assert worst(result(*args), model(*args)) <= 1e-4
