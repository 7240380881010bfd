"""What can be written back is written, and what cannot is blamed on the rewrite that made it; copies share nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normfuse
from tests.support import randomised

STANDARDIZED = "its weight is computed by the module's own code at each call"


class ByBatchNorm(nn.Conv2d):
    """timm's StdConv2d: the last step is a view."""

    def forward(self, input: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(input, w.reshape_as(self.weight), self.bias)


class ByHand(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Flattened(nn.Conv2d):
    """Computed, then seen through two views."""

    def forward(self, input: Tensor) -> Tensor:
        w = (self.weight * 1.5).exp().flatten(1).t()
        return F.conv2d(input, w.t().unflatten(1, self.weight.shape[1:]), self.bias)


class Cast(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, (-self.weight.double().exp()).to(input.dtype), self.bias)


class Decay(nn.Module):
    """Mamba's: A = -exp(A_log), read by a product."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.rand(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        decay = -torch.exp(self.log.float())
        return x * (x.abs().mean((2, 3), keepdim=True) * decay[None, :, :, None]).exp()


@pytest.mark.parametrize("kind", [ByBatchNorm, ByHand, Flattened, Cast, Decay])
def test_a_weight_computed_in_forward_costs_nothing_but_itself(kind: Callable[..., nn.Module]) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), kind(3, 3, 3)))
    x = torch.randn(2, 3, 8, 8) + 0.3
    before = model(x).detach()
    report = normfuse.optimize_(model, (x,))
    assert report.fired == {"fold_batch_norm": 1} and isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    refused = {r.pass_name for r in report.refusals if STANDARDIZED in r.reason}
    assert refused <= {"bake_weights"} and (refused or kind is Decay)


class SinkAttention(nn.Module):
    """The scale stands behind what is no projection, and the softmax has a sink: the scale cannot be written back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.sinks = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.q(y).roll(1, -1) @ self.k(y).roll(1, -1).transpose(1, 2) * 8**-0.5
        scores = torch.cat([scores, self.sinks.expand(*scores.shape[:2], 1)], -1)
        return x + self.o(torch.softmax(scores, -1)[..., :-1] @ self.v(y))  # type: ignore[no-any-return]


def test_the_rewrite_beside_one_that_cannot_be_written_stays() -> None:
    model = randomised(nn.Sequential(SinkAttention(), SinkAttention()))
    x = torch.randn(2, 5, 8) + 0.3
    before = model(x).detach()
    report = normfuse.optimize_(model, (x,))
    assert report.fired == {"fold_norm_affine": 2}
    assert {r.pass_name for r in report.refusals if "written back" in r.reason} <= {"fold_scalars"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight and bias": lambda m: parametrizations.weight_norm(parametrizations.weight_norm(m), "bias"),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_copy_is_changed_and_its_original_is_not(name: str) -> None:
    model = nn.Sequential(PARAMETRIZED[name](nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 6)).eval()
    for parameter in model[2].parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6) + 0.3
    before, mine, other = model(x).detach(), copy.deepcopy(model), copy.deepcopy(model)
    report = normfuse.optimize_(mine, (x,))
    assert report.fired["bake_weights"] >= 1 and not parametrize.is_parametrized(mine[0], "weight")
    torch.testing.assert_close(mine(x), before, rtol=1e-5, atol=1e-6)
    for each in (model, other):
        assert parametrize.is_parametrized(each[0], "weight") and torch.equal(each(x), before)
        assert torch.equal(copy.deepcopy(each)(x), before)
    normfuse.optimize_(other, (x,))
    assert torch.equal(model(x), before) and type(other[0]) is nn.Linear
