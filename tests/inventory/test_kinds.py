"""Kinds that are sums of maps of one tensor, spellings of BatchNorm, and where eps stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse


def _settled(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            if "var" in name or "mean" in name or norm.__class__.__name__.startswith("BatchNorm"):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return norm


class RepBatchNorm(nn.Module):
    """SLAB's: BN(x) + eta x over tokens."""

    def __init__(self, spell: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = _settled(nn.BatchNorm1d(8))
        self.eta = nn.Parameter(torch.tensor([0.3]))
        self.spell = spell

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.spell(self.norm(x), x, self.eta).transpose(1, 2)


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 12), nn.Linear(8, 2, bias=False), nn.Linear(2, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + 0.5 * self.up(self.down(x))).relu()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.thin = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = _settled(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.wide(x)) + self.thin(x) + x).relu()


@pytest.mark.parametrize(
    "spell",
    [lambda y, x, eta: y + eta * x, lambda y, x, eta: x * eta + y, lambda y, x, eta: y + x, lambda y, x, eta: y - 0.5 * x],
)
def test_a_rep_batch_norm_is_one_pattern(spell: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    model = nn.Sequential(RepBatchNorm(spell), nn.Linear(8, 8), nn.ReLU(), RepBatchNorm(spell), nn.Linear(8, 8)).eval()
    found = normfuse.inspect(model, (torch.randn(2, 5, 8),))
    assert found.count("rep_batch_norm") == 2
    assert found.count("batch_norm") == 0
    assert {(p.eps, p.affine) for p in found.patterns} == {(1e-5, "weight and bias")}


def test_a_residual_round_more_than_a_norm_is_none() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = _settled(nn.BatchNorm1d(8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(x).relu() + self.linear(x.tanh())

    found = normfuse.inspect(Residual().eval(), (torch.randn(3, 8),))
    assert [p.kind for p in found.patterns] == ["batch_norm"]


def test_adapters_are_counted() -> None:
    found = normfuse.inspect(nn.Sequential(Adapted(), nn.Linear(12, 8), nn.Tanh(), Adapted()).eval(), (torch.randn(3, 8),))
    assert (found.count("lora"), found.count("branches")) == (2, 0)


def test_branches_are_counted_and_the_norms_in_them() -> None:
    found = normfuse.inspect(nn.Sequential(Branches(), Branches()).eval(), (torch.randn(2, 4, 5, 5),))
    assert (found.count("branches"), found.count("batch_norm"), found.count("lora")) == (2, 2, 0)


SPELT: dict[str, Callable[[nn.BatchNorm2d, Tensor], Tensor]] = {
    "native": lambda b, x: torch.native_batch_norm(
        x, b.weight, b.bias, b.running_mean, b.running_var, False, 0.1, b.eps
    )[0],
    "index": lambda b, x: torch._batch_norm_impl_index(
        x, b.weight, b.bias, b.running_mean, b.running_var, False, 0.1, b.eps, False
    )[0],
    "plain": lambda b, x: torch.batch_norm(
        x, b.weight, b.bias, b.running_mean, b.running_var, False, 0.1, b.eps, False
    ),
}  # fmt: skip


class Spelt(nn.Module):
    def __init__(self, spell: Callable[[nn.BatchNorm2d, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.spell = nn.Conv2d(4, 4, 3), _settled(nn.BatchNorm2d(4, eps=1e-3)), spell

    def forward(self, x: Tensor) -> Tensor:
        return self.spell(self.norm, self.conv(x)).relu()


@pytest.mark.parametrize("name", SPELT)
def test_a_batch_norm_is_seen_and_folds_however_it_is_called(name: str) -> None:
    model, x = Spelt(SPELT[name]).eval(), torch.randn(2, 4, 5, 5)
    [pattern] = normfuse.inspect(model, (x,)).patterns
    assert (pattern.kind, pattern.eps, pattern.eps_place) == ("batch_norm", 1e-3, "inside")
    found = normfuse.optimize(model, (x,))
    assert found.report.fired == {"fold_batch_norm": 1}
    torch.testing.assert_close(found(x), model(x))


class Frozen(nn.Module):
    """A frozen norm written out over the last axis, between a linear and another."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.before = _settled(nn.BatchNorm1d(8)), nn.Linear(8, 8), nn.Linear(8, 8), before

    def forward(self, x: Tensor) -> Tensor:
        b, x = self.norm, self.one(x)
        x = x if self.before else x.relu()
        x = (x - b.running_mean) * torch.rsqrt(b.running_var + b.eps) * b.weight + b.bias
        return self.two(x.relu() if self.before else x)


@pytest.mark.parametrize("sizes", [(5, 8), (2, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("before", [True, False])
def test_a_frozen_norm_over_the_last_axis_folds(sizes: tuple[int, ...], *, before: bool) -> None:
    model, x = Frozen(before=before).eval(), torch.randn(sizes)
    assert normfuse.inspect(model, (x,)).count("batch_norm") == 1
    found = normfuse.optimize(model, (x,))
    assert sum(n for name, n in found.report.fired.items() if name.startswith("fold_batch_norm")) == 1
    assert not any("batch_norm" in str(n.target) for n in found.graph_module.graph.nodes)
    torch.testing.assert_close(found(x), model(x))


PLACES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "inside": ("rms_norm", lambda x: x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()),
    "outside": ("l2_norm", lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1)),
    "clamp": ("l2_norm", lambda x: F.normalize(x, dim=-1, eps=0.1)),
    "floor": ("rms_norm", lambda x: x * x.square().mean(-1, keepdim=True).clamp_min(0.1).rsqrt()),
    "outside of a layer_norm": ("layer_norm", lambda x: (x - x.mean(-1, True)) / (x.std(-1, False, True) + 0.1)),  # type: ignore[call-overload]
}


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", PLACES)
def test_where_eps_stands_is_said(name: str) -> None:
    kind, function = PLACES[name]
    found = normfuse.inspect(Applied(function).eval(), (torch.randn(3, 8),))
    [pattern] = found.patterns
    place = name.split(" ")[0]
    assert (pattern.kind, pattern.eps, pattern.eps_place) == (kind, 0.1, place)
    assert ("0.1" if place == "inside" else f"0.1 {place}") in str(found)
    assert found.to_dict()["patterns"][0]["eps_place"] == place


def test_what_has_no_eps_has_no_place_of_it() -> None:
    [pattern] = normfuse.inspect(Applied(lambda x: x.softmax(-1)).eval(), (torch.randn(3, 8),)).patterns
    assert pattern.eps_place == ""
