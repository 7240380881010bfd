"""Weights that are functions of parameters: Weight Standardization in its conventions, two-sided maps, DoRA, timm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.support import image, operators, optimized, randomised

NAME = "bake_weights"
Standard = Callable[[Tensor], Tensor]


def original(w: Tensor) -> Tensor:
    """Qiao et al. 2019 (arXiv 1903.10520): the unbiased deviation, with eps behind the root."""
    rows = w.flatten(1)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)).view_as(w)


def inside(w: Tensor) -> Tensor:
    """timm: the biased variance, with eps inside the root."""
    rows = w.flatten(1)
    variance, mean = torch.var_mean(rows, dim=1, keepdim=True, unbiased=False)
    return ((rows - mean) * torch.rsqrt(variance + 1e-6)).view_as(w)


def clamped(w: Tensor) -> Tensor:
    """Brock et al. 2021 (arXiv 2101.08692): scaled by the fan-in, with eps as a floor."""
    rows = w.flatten(1)
    count = rows.shape[1]
    variance = rows.var(1, keepdim=True, unbiased=False)
    return ((rows - rows.mean(1, keepdim=True)) / torch.sqrt((variance * count).clamp_min(1e-4))).view_as(w)


def batch_normed(w: Tensor) -> Tensor:
    """timm's spelling: the batch norm of the weight, as one batch of long channels."""
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


class Standardized(nn.Conv2d):
    def __init__(self, standard: Standard, *, scaled: bool = False) -> None:
        super().__init__(1, 6, 3, padding=1)  # a fan-in of 9
        self.standard = standard
        self.gain = nn.Parameter(torch.ones(6, 1, 1, 1)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.standard(self.weight)
        if self.gain is not None:
            weight = weight * self.gain * 1.7139588594436646 * 9**-0.5
        return F.conv2d(x, weight, self.bias, padding=1)


CONVENTIONS = {s.__name__: s for s in (original, inside, clamped, batch_normed)}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scaled", [False, True])
def test_weight_standardization_becomes_a_plain_convolution(convention: str, scaled: bool) -> None:
    model, x = randomised(Standardized(CONVENTIONS[convention], scaled=scaled)), image(2, 1, 7, 7)
    result = optimized(model, x, passes=[NAME])
    assert operators(result) == ["conv2d"]
    weight = next(p for p in result.graph_module.parameters() if p.dim() == 4)
    with torch.no_grad():
        expected = model.standard(model.weight.double())
        if scaled:
            expected = expected * model.gain.double() * 1.7139588594436646 / 3
    assert (weight - expected).abs().max() / expected.abs().max() <= 1e-7


def test_the_conventions_differ() -> None:
    """What swapping them would do on a fan-in of 9: no tolerance hides it."""
    weight = torch.randn(6, 1, 3, 3).double()
    for a, b in ((original, inside), (original, clamped), (inside, clamped)):
        x, y = a(weight), b(weight)
        assert (x - y).abs().max() / y.abs().max() >= 1e-4


class TwoSided(nn.Module):
    """Weight Squeezing and WID: L W R."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5, 3))

    def forward(self, w: Tensor) -> Tensor:
        return self.left @ w @ self.right


def test_two_sided_maps() -> None:
    layer = randomised(nn.Linear(5, 6, bias=False))
    parametrize.register_parametrization(layer, "weight", TwoSided(), unsafe=True)
    result = optimized(randomised(layer), image(2, 3), passes=[NAME])
    assert operators(result) == ["linear"]


class DoRA(nn.Module):
    """m (W + s B A) / |W + s B A| per row (METHODS 1.11)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.magnitude = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(6))
        self.a, self.b = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 0.5 * self.b @ self.a
        return F.linear(x, self.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True))


def test_dora_written_as_a_weight() -> None:
    assert operators(optimized(randomised(DoRA()), image(3, 5), passes=[NAME])) == ["linear"]


class DoRABranches(DoRA):
    """The same as adapters add it: on top of the base, by magnitudes over norms."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 0.5 * self.b @ self.a
        ratio = self.magnitude / weight.norm(dim=1)
        base = F.linear(x, self.weight)
        return base + (ratio - 1) * base + ratio * (F.linear(F.linear(x, self.a), self.b) * 0.5)


def test_dora_written_as_branches() -> None:
    result = optimized(randomised(DoRABranches()), image(3, 5))
    assert operators(result) == ["linear"]


@pytest.mark.slow
def test_norm_free_networks_of_timm_hold_no_norm() -> None:
    from tests.zoo.entry import randomise, seeded
    from tests.zoo.torchvision_stub import import_timm

    example = (image(2, 3, 64, 64),)
    with seeded("test_nfnet"):
        model = randomise(import_timm().create_model("test_nfnet").eval(), (example, {}))
    result = optimized(model, *example)
    assert "batch_norm" not in operators(result)


class WholeNorm(nn.Linear):
    """A weight so large that it is baked in blocks of rows, normalised over all of them at once."""

    def __init__(self) -> None:
        super().__init__(600, 600, bias=False)
        with torch.no_grad():
            self.weight.mul_(torch.linspace(1, 5, 600)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.layer_norm(self.weight, self.weight.shape))


def test_a_norm_over_the_rows_too_is_not_computed_row_by_row() -> None:
    found = optimized(WholeNorm().eval(), torch.randn(2, 600), passes=[NAME])
    assert found.report.fired[NAME] == 1 and "layer_norm" not in operators(found)
