"""fold_batch_norm_forward: linears, convolutions, pools, borders; RepBN, Unified Normalization and PowerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.graph.node import op_name
from normfuse.passes import fold_batch_norm_forward
from tests.passes.checking import (
    assert_idempotent,
    assert_mutant_fails,
    assert_same,
    images,
    ops,
    randomized,
    reasons,
    relative,
    run,
)

PASS = "fold_batch_norm_forward"
NORMS = {"batch_norm", "mul", "rsqrt", "div", "sub"}


class RepBN(nn.Module):
    """BN(x) + eta x over tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.eta = nn.BatchNorm1d(channels), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return (self.norm(x) + self.eta * x).transpose(1, 2)


class Unified(nn.Module):
    """Unified Normalization at inference, written out: a scale, and a shift where it has one."""

    def __init__(self, channels: int, *, shifted: bool = True, axes: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if shifted else None
        self.register_buffer("running_var", torch.ones(channels))
        self.sizes = (channels, *[1] * axes)

    def forward(self, x: Tensor) -> Tensor:
        y = x / torch.sqrt(self.running_var + 1e-5).view(self.sizes) * self.weight.view(self.sizes)
        return y if self.bias is None else y + self.bias.view(self.sizes)


class Power(nn.Module):
    """PowerNorm at inference: the group scaling is dynamic, the rest is a scale and a shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rest = Unified(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


class Heads(nn.Module):
    """One norm, three readers."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k = nn.Linear(channels, 5), nn.Linear(channels, 6, bias=False)
        self.v = nn.Parameter(torch.ones(channels, 7))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(torch.tanh(x))
        return self.q(x), self.k(x), x @ self.v


class Behind(nn.Module):
    """norm, something, projection."""

    def __init__(self, norm: nn.Module, between: Callable[[Tensor], Tensor], reader: nn.Module) -> None:
        super().__init__()
        self.norm, self.between, self.reader = norm, between, reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self.norm(x)))


def same(x: Tensor) -> Tensor:
    return x


def tokens(channels: int) -> Tensor:
    return torch.randn(2, 5, channels) + 0.6


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: Behind(nn.BatchNorm1d(6), same, nn.Linear(6, 4)), lambda: torch.randn(3, 6) + 0.6),
    "tokens": (lambda: Heads(RepBN(6), 6), lambda: tokens(6)),
    "unified": (lambda: Heads(Unified(6), 6), lambda: tokens(6)),
    "unpadded": (lambda: Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3)), lambda: images(6, 7, 8)),
    "grouped": (lambda: Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, groups=2)), lambda: images(6, 7, 8)),
    "depthwise": (lambda: Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 6, 3, groups=6)), lambda: images(6, 7, 8)),
    "1d": (lambda: Behind(nn.BatchNorm1d(6), same, nn.Conv1d(6, 4, 3, bias=False)), lambda: images(6, 9)),
    "3d": (lambda: Behind(nn.BatchNorm3d(6), same, nn.Conv3d(6, 4, 2)), lambda: images(6, 4, 4, 5)),
    "reflect": (
        lambda: Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")),
        lambda: images(6, 7, 8),
    ),
    "circular": (
        lambda: Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")),
        lambda: images(6, 7, 8),
    ),
    "replicate": (
        lambda: Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate")),
        lambda: images(6, 7, 8),
    ),
    "flatten": (lambda: Behind(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(36, 4)), lambda: images(3, 3, 4)),
    "mean": (lambda: Behind(nn.BatchNorm2d(6), lambda x: x.mean((2, 3)), nn.Linear(6, 4)), lambda: images(6, 5, 5)),
    "pool": (
        lambda: Behind(nn.BatchNorm2d(6), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), nn.Linear(6, 4)),
        lambda: images(6, 5, 5),
    ),
    "scale, zero padding": (
        lambda: Behind(Unified(6, shifted=False, axes=2), same, nn.Conv2d(6, 4, 3, padding=1)), lambda: images(6, 7, 8)
    ),
    "scale, transposed": (
        lambda: Behind(Unified(6, shifted=False, axes=2), same, nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2)),
        lambda: images(6, 5, 5),
    ),
}  # fmt: skip


# --- fires, same function


@pytest.mark.parametrize("name", CASES)
def test_a_norm_goes_into_its_readers(name: str) -> None:
    make, example = CASES[name]
    optimized = run(randomized(make()), [example()], PASS)
    assert optimized.report.fired == {PASS: 1}, optimized.report.refusals
    assert not set(ops(optimized)) & NORMS
    assert_same(optimized)


def test_a_linear_without_a_bias_gets_one() -> None:
    optimized = run(randomized(Behind(RepBN(6), same, nn.Linear(6, 4, bias=False))), [tokens(6)], PASS)
    [call] = [n for n in optimized.graph_module.graph.nodes if "linear" in str(n.target)]
    assert call.args[2] is not None
    assert_same(optimized)


def test_of_power_norm_the_dynamic_half_remains() -> None:
    optimized = run(randomized(Behind(Power(6), same, nn.Linear(6, 4))), [tokens(6)], PASS)
    assert optimized.report.fired == {PASS: 1}
    called = [op_name(node) for node in optimized.program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if name not in ("linear", "unsqueeze", "sym_size")] == ["rms_norm"]
    assert_same(optimized)


def test_both_sides_of_a_token_norm() -> None:
    """Behind a linear it folds backward, in front of one forward."""
    model = randomized(nn.Sequential(nn.Linear(4, 6), RepBN(6), nn.Linear(6, 5), nn.Tanh(), RepBN(5), nn.Linear(5, 3)))
    optimized = normfuse.optimize(model, (tokens(4),))
    assert not set(ops(optimized)) & NORMS
    assert_same(optimized)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("border", ["map", "pad"])
def test_zeros_around_a_shift_are_repaired_when_asked_for(border: Any, free: bool) -> None:
    """The plain fold is right inside and wrong at the border; either repair is right everywhere."""
    model = randomized(Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1, stride=2))).double()
    x = images(6, 9, 10).double()
    rule = fold_batch_norm_forward.configured(border=border)
    optimized = normfuse.optimize(model, (x,), passes=[rule], dynamic_shapes="auto" if free else None)
    assert optimized.report.fired == {PASS: 1}
    assert ops(optimized)["constant_pad_nd"] == {"map": 0, "pad": 1 + free}[border]
    assert_same(optimized)
    with torch.no_grad():
        expected = model(x)
        scale = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)
        shift = model.norm.bias - model.norm.running_mean * scale
        weight = model.reader.weight * scale[:, None, None]
        bias = model.reader.bias + (model.reader.weight * shift[:, None, None]).sum((1, 2, 3))
        naive = F.conv2d(x, weight, bias, 2, 1)
        inside = (..., slice(1, -1), slice(1, -1))
        assert relative(naive[inside], expected[inside]) <= 1e-12
        assert relative(naive, expected) >= 1e-2
        assert relative(optimized(x), expected) <= 1e-12


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": "same", "kernel": 4}, {"padding": (2, 1), "dilation": 2, "groups": 2}]
)
def test_the_padding_that_becomes_zero_goes_where_the_zeros_were(options: dict[str, Any]) -> None:
    kernel = options.pop("kernel", 3)
    model, args = randomized(Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, kernel, **options))), (images(6, 9, 10),)
    optimized = normfuse.optimize(model, args, passes=[fold_batch_norm_forward.configured(border="pad")])
    assert optimized.report.fired == {PASS: 1}
    assert_same(optimized)


# --- refuses


def test_no_padding_becomes_zero_under_a_scale_of_zero() -> None:
    model, args = randomized(Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1))), (images(6, 7, 8),)
    with torch.no_grad():
        model.norm.weight[2] = 0
    optimized = normfuse.optimize(model, args, passes=[fold_batch_norm_forward.configured(border="pad")])
    assert not optimized.report.fired
    assert "a channel has a scale of zero" in reasons(optimized, PASS)
    assert run(model, args, PASS).report.fired == {PASS: 1}


def test_a_scale_of_zero_in_another_checkpoint_is_not_replayed_silently() -> None:
    model, args = randomized(Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1))), (images(6, 7, 8),)
    rule = fold_batch_norm_forward.configured(border="pad")
    optimized = normfuse.optimize(model, args, passes=[rule], dynamic_shapes=None)
    with torch.no_grad():
        model.norm.weight[2] = 0
    with pytest.raises(normfuse.NormfuseError, match="has no value in this checkpoint"):
        normfuse.replay(optimized.report.weights, model.state_dict())


def test_unknown_borders_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="border must be one of map, pad"):
        fold_batch_norm_forward.configured(border="mirror")  # type: ignore[arg-type]


def test_zeros_around_a_shift_stay_unasked() -> None:
    model = randomized(Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1)))
    optimized = normfuse.optimize(model, (images(6, 7, 8),))
    assert not optimized.report.fired
    assert "zero padding" in reasons(optimized, PASS)


def test_a_shift_does_not_pass_a_transposed_convolution() -> None:
    optimized = run(randomized(Behind(nn.BatchNorm2d(6), same, nn.ConvTranspose2d(6, 4, 3))), [images(6, 5, 5)], PASS)
    assert not optimized.report.fired
    assert "transposed" in reasons(optimized, PASS)


@pytest.mark.parametrize("negative", [False, True])
def test_the_maximum_lets_positive_scales_through(negative: bool) -> None:
    model = randomized(Behind(nn.BatchNorm2d(6), nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten()), nn.Linear(96, 4)))
    with torch.no_grad():
        model.norm.weight.abs_()
        model.norm.weight[3] *= -1 if negative else 1
    optimized = run(model, [images(6, 8, 8)], PASS)
    assert optimized.report.fired == ({} if negative else {PASS: 1})
    if negative:
        assert "negative" in reasons(optimized, PASS)
    assert_same(optimized)


def test_a_sign_that_only_this_checkpoint_has_is_not_replayed_silently() -> None:
    model = randomized(Behind(nn.BatchNorm2d(6), nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Linear(24, 4)))
    with torch.no_grad():
        model.norm.weight.abs_()
        optimized = run(model, [images(6, 4, 4)], PASS)
        model.norm.weight[3] *= -1
    with pytest.raises(normfuse.NormfuseError, match="a number whose sign the rewrite rests on has another one"):
        normfuse.replay(optimized.report.weights, model.state_dict())


def test_a_norm_without_gain_is_positive_for_every_checkpoint() -> None:
    norm = nn.BatchNorm2d(6, affine=False)
    model = randomized(Behind(norm, nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Linear(24, 4)))
    optimized = run(model, [images(6, 4, 4)], PASS)
    assert optimized.report.fired == {PASS: 1}
    assert not any("where" in str(w) for w in optimized.report.weights.values())


@pytest.mark.parametrize(
    "between,why",
    [(torch.relu, "relu"), (lambda x: x + torch.tanh(x), "tanh"), (lambda x: F.avg_pool2d(x, 3, 1, 1), "avg_pool2d")],
)
def test_other_readers_keep_the_norm(between: Any, why: str) -> None:
    optimized = run(randomized(Behind(nn.BatchNorm2d(6), between, nn.Conv2d(6, 4, 1))), [images(6, 5, 5)], PASS)
    assert not optimized.report.fired
    assert why in reasons(optimized, PASS)


def test_an_output_keeps_the_norm() -> None:
    class Tapped(Behind):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(x)
            return self.reader(y), y

    optimized = run(randomized(Tapped(nn.BatchNorm1d(6), same, nn.Linear(6, 4))), [torch.randn(3, 6)], PASS)
    assert not optimized.report.fired
    assert "output" in reasons(optimized, PASS)


# --- a mutant fails, idempotent


def test_a_mutant_fails() -> None:
    assert_mutant_fails(randomized(Behind(nn.BatchNorm1d(6), same, nn.Linear(6, 4))), [torch.randn(3, 6)], PASS)


def test_a_second_run_finds_nothing() -> None:
    args = [images(6, 9, 10)]
    model = randomized(Behind(nn.BatchNorm2d(6), same, nn.Conv2d(6, 4, 3, padding=1)))
    assert_idempotent(run(model, args, PASS, dynamic_shapes=None), args, PASS)
