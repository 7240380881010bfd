"""bake_weights: parameters that are computed from parameters become parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normfuse
from tests.support import assert_idempotent, image, operators, optimized, randomised, reasons

NAME = "bake_weights"
Wrap = Callable[[nn.Module], nn.Module]


def old(function: Callable[..., nn.Module]) -> Wrap:
    def wrap(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(module)

    return wrap


WRAPS: dict[str, Wrap] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm dim 1": lambda m: parametrizations.weight_norm(m, dim=1),
    "weight_norm whole": lambda m: parametrizations.weight_norm(m, dim=None),
    "weight_norm hook": old(nn.utils.weight_norm),
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm hook": old(nn.utils.spectral_norm),
}
LAYERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "linear": lambda: (nn.Linear(6, 5), image(3, 6)),
    "conv": lambda: (nn.Conv2d(4, 6, 3), image(2, 4, 7, 7)),
    "transposed": lambda: (nn.ConvTranspose2d(4, 6, 3), image(2, 4, 5, 5)),
}


def trained(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    """Three forwards in training mode: spectral_norm's power iteration is then somewhere in between."""
    layer.train()
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    return layer.eval()


class Conditioned(nn.Module):
    """Rows to unit length: weight conditioning by a diagonal preconditioner (METHODS 1.9)."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.dim() - 1))


class Compander(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.3))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.a * torch.atan(v / self.b)


class Noisy(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w + torch.rand_like(w)


# -- fires ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", list(WRAPS), ids=str)
@pytest.mark.parametrize("layer", list(LAYERS), ids=str)
def test_weight_and_spectral_norm(wrap: str, layer: str) -> None:
    module, x = LAYERS[layer]()
    model = trained(WRAPS[wrap](randomised(module)), x)
    result = optimized(model, x, passes=[NAME])
    assert result.report.fired[NAME] >= 1
    assert len(operators(result)) == 1, operators(result)


def test_spectral_norm_keeps_its_power_iteration() -> None:
    module, x = LAYERS["linear"]()
    model = trained(parametrizations.spectral_norm(module), x)
    vectors = [b.clone() for b in model.buffers()]
    optimized(model, x, passes=[NAME])
    assert all(torch.equal(a, b) for a, b in zip(vectors, model.buffers(), strict=True))


@pytest.mark.parametrize("reparametrization", [Conditioned(), Compander()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("layer", list(LAYERS), ids=str)
def test_any_function_of_parameters(reparametrization: nn.Module, layer: str) -> None:
    module, x = LAYERS[layer]()
    randomised(module)
    parametrize.register_parametrization(module, "weight", reparametrization)
    result = optimized(module.eval(), x, passes=[NAME])
    assert len(operators(result)) == 1


def test_the_new_weight_is_the_float64_value_rounded_once() -> None:
    module, x = LAYERS["linear"]()
    model = parametrizations.weight_norm(randomised(module))
    result = optimized(model.eval(), x, passes=[NAME])
    ((name, program),) = result.report.weights.items()
    g, v = model.parametrizations.weight.original0, model.parametrizations.weight.original1  # type: ignore[union-attr]
    expected = g.double() * v.double() / v.double().norm(dim=1, keepdim=True)
    assert torch.equal(result.tensors()[name], expected.float())
    replayed = normfuse.replay(result.report.weights, model.state_dict())
    assert torch.equal(replayed[name], expected.float())
    assert set(program.sources) == {"parametrizations.weight.original0", "parametrizations.weight.original1"}


# -- refuses -------------------------------------------------------------------------------------------------------


def test_random_weights_are_refused() -> None:
    module, x = LAYERS["linear"]()
    parametrize.register_parametrization(randomised(module), "weight", Noisy())
    result = normfuse.optimize(module.eval(), (x,), passes=[NAME], verify=False)
    assert NAME not in result.report.fired
    assert any("draws random numbers" in r for r in reasons(result, NAME))


def test_views_of_parameters_are_left_alone() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t().contiguous().t()

    result = optimized(Viewed().eval(), image(3, 6), passes=[NAME])
    assert sum(t.numel() for t in result.tensors().values()) == 30


# -- a mutant fails ------------------------------------------------------------------------------------------------


def test_a_weight_off_by_a_millionth_is_caught() -> None:
    module, x = LAYERS["linear"]()
    model = parametrizations.weight_norm(randomised(module)).eval()
    result = normfuse.optimize(model, (x,), passes=[NAME])
    wrong = normfuse.optimize(model, (x,), passes=[NAME])
    with torch.no_grad():
        for t in wrong.tensors().values():
            t.mul_(1 + 1e-5)
    assert normfuse.verify(model, result, (x,))
    assert not normfuse.verify(model, wrong, (x,))


# -- idempotent ----------------------------------------------------------------------------------------------------


def test_idempotent() -> None:
    module, x = LAYERS["conv"]()
    result = optimized(parametrizations.weight_norm(randomised(module)).eval(), x, passes=[NAME])
    assert_idempotent(result, x, pass_name=NAME)
