"""One push for every gain: what BatchNorm's scale and shift pass, LayerNorm's and every other norm's pass; and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.graph.node import op_name
from tests.passes.checking import EXACT, images, ops, randomized, reasons

CHANNELS = 6
View = Callable[[Tensor], Tensor]


class LayerNorm(nn.LayerNorm):
    """Over the channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DyT(nn.Module):
    def __init__(self, *, squash: View = torch.tanh) -> None:
        super().__init__()
        self.alpha, self.squash = nn.Parameter(torch.full((1,), 0.7)), squash
        self.weight, self.bias = (nn.Parameter(torch.ones(CHANNELS, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.squash(self.alpha * x) + self.bias


class L2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(CHANNELS, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.weight + self.bias


class Standardized(nn.Module):
    """The unbiased deviation, eps outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(CHANNELS, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4) + self.bias


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(CHANNELS), "fold_batch_norm_forward"),
    "layer norm": (lambda: LayerNorm(CHANNELS), "fold_norm_affine"),
    "rms norm": (lambda: RMSNorm(CHANNELS), "fold_norm_affine"),
    "group norm": (lambda: nn.GroupNorm(2, CHANNELS), "fold_norm_affine"),
    "instance norm": (lambda: nn.InstanceNorm2d(CHANNELS, affine=True), "fold_norm_affine"),
    "dyt": (DyT, "fold_norm_affine"),
    "derf": (lambda: DyT(squash=torch.erf), "fold_norm_affine"),
    "standardize": (Standardized, "fold_norm_affine"),
    "l2": (L2, "fold_batch_norm_forward"),
}


class Read(nn.Module):
    """norm, something, projections."""

    def __init__(self, norm: nn.Module, between: Callable[[Tensor], Any], *readers: nn.Module) -> None:
        super().__init__()
        self.norm, self.between, self.readers = norm, between, nn.ModuleList(readers)

    def forward(self, x: Tensor) -> Any:
        given = self.between(self.norm(torch.sin(x)))
        many = given if isinstance(given, tuple | list) else [given]
        return tuple(reader(y) for reader, y in zip(self.readers, many, strict=True))


def same(x: Tensor) -> Tensor:
    return x


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


READERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[], tuple[nn.Module, ...]]]] = {
    "convolution": (same, lambda: (nn.Conv2d(6, 4, 3),)),
    "grouped": (same, lambda: (nn.Conv2d(6, 4, 3, groups=2),)),
    "depthwise": (same, lambda: (nn.Conv2d(6, 6, (3, 1), groups=6, bias=False),)),
    "reflecting": (same, lambda: (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),)),
    "circular": (same, lambda: (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),)),
    "linear over tokens": (tokens, lambda: (nn.Linear(6, 4),)),
    "mean over tokens": (lambda x: tokens(x).mean(1), lambda: (nn.Linear(6, 4),)),
    "mean over the image": (lambda x: x.mean((2, 3)), lambda: (nn.Linear(6, 4),)),
    "pooled": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda: (nn.Linear(6, 4),)),
    "flattened": (lambda x: x.flatten(1), lambda: (nn.Linear(6 * 20, 4),)),
    "flattened tokens": (lambda x: tokens(x).flatten(1), lambda: (nn.Linear(20 * 6, 4),)),
    "bilinear": (lambda x: F.interpolate(x, (7, 9), mode="bilinear"), lambda: (nn.Conv2d(6, 4, 1),)),
    "bicubic": (lambda x: F.interpolate(x, (7, 9), mode="bicubic"), lambda: (nn.Conv2d(6, 4, 1),)),
    "beside others": (lambda x: torch.cat([torch.ones_like(x[:, :2]), x], 1), lambda: (nn.Conv2d(8, 4, 1),)),
    "cut in two": (lambda x: x.split([2, 4], 1), lambda: (nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3))),
    "a slice": (lambda x: x[:, 1:5], lambda: (nn.Conv2d(4, 4, 1),)),
    "one token": (lambda x: tokens(x)[:, 0], lambda: (nn.Linear(6, 4),)),
    "moved": (lambda x: x.roll(1, 2).flip(3), lambda: (nn.Conv2d(6, 4, 1),)),
    "maximum": (lambda x: F.max_pool2d(x, 2), lambda: (nn.Conv2d(6, 4, 1),)),
    "largest": (lambda x: tokens(x).amax(1), lambda: (nn.Linear(6, 4),)),
    "three readers": (lambda x: (x, x, tokens(x)), lambda: (nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 3), nn.Linear(6, 2))),
}


def pushed(norm: str, reader: str) -> tuple[nn.Module, normfuse.Optimized]:
    (make, name), (between, readers) = NORMS[norm], READERS[reader]
    model = randomized(Read(make(), between, *readers()))
    with torch.no_grad():
        model.get_parameter("norm.weight").abs_()  # for the maximum
    return model, normfuse.optimize(model, (images(CHANNELS, 4, 5),), passes=[name], dynamic_shapes=None)


def assert_pushed(norm: str, reader: str) -> None:
    _, optimized = pushed(norm, reader)
    assert optimized.report.fired == {NORMS[norm][1]: 1}, optimized.report.refusals
    left = {op_name(node) for node in optimized.program.graph.nodes}  # before our own operators are lowered to torch's
    assert not {"mul", "batch_norm"} & left
    assert optimized.report.verification and optimized.report.verification.error_float64 <= EXACT
    assert not optimized.report.rolled_back


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("norm", ["batch norm", "layer norm"])
def test_what_batch_norm_passes_layer_norm_passes(norm: str, reader: str) -> None:
    assert_pushed(norm, reader)


@pytest.mark.parametrize("reader", ["grouped", "flattened"])
@pytest.mark.parametrize("norm", list(NORMS)[2:])
def test_every_norm_has_the_same_readers(norm: str, reader: str) -> None:
    assert_pushed(norm, reader)


# -- forward, what does not pass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch norm", "layer norm"])
@pytest.mark.parametrize(
    ("between", "reader", "why"),
    [
        (lambda x: x + x.flip(2), nn.Conv2d(6, 4, 1), "also read by add"),
        (lambda x: x * torch.sigmoid(x), nn.Conv2d(6, 4, 1), "also read by"),
        (lambda x: torch.cat([x, x.flip(2)], 1), nn.Conv2d(12, 4, 1), "also read by cat"),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), nn.Conv2d(6, 4, 1), "also read by avg_pool2d"),
        (lambda x: x.sum((2, 3)), nn.Linear(6, 4), "also read by sum"),
        (lambda x: x, nn.ConvTranspose2d(6, 4, 2), "transposed convolution"),
        (lambda x: x.softmax(1), nn.Conv2d(6, 4, 1), "also read by softmax"),
    ],
)
def test_what_does_not_pass(norm: str, between: Any, reader: nn.Module, why: str) -> None:
    make, name = NORMS[norm]
    model = randomized(Read(make(), between, reader))
    optimized = normfuse.optimize(model, (images(CHANNELS, 4, 5),), passes=[name], dynamic_shapes=None, verify=False)
    assert optimized.report.fired == {}
    assert why in reasons(optimized, name)


def test_a_gain_alone_passes_a_gate_once() -> None:
    """u * v takes the gain of u; u * flip(u) would take its square."""
    gated = randomized(Read(RMSNorm(6), lambda x: x * torch.ones_like(x).cumsum(1), nn.Conv2d(6, 4, 3, padding=1)))
    squared = randomized(Read(RMSNorm(6), lambda x: x * x.flip(2), nn.Conv2d(6, 4, 1)))
    for model, fired in ((gated, {"fold_norm_affine": 1}), (squared, {})):
        optimized = normfuse.optimize(model, (images(6, 4, 5),), passes=["fold_norm_affine"], dynamic_shapes=None)
        assert optimized.report.fired == fired and not optimized.report.rolled_back


# -- backward --------------------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """Two convolutions, something, a norm by running statistics or a gain."""

    def __init__(self, last: nn.Module, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1, bias=False)
        self.last, self.between = last, between

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(self.between(self.a(x), self.b(x))))


class Gain(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Late(Gain):
    """A gain that is computed behind what it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.gain.exp() * 2)


class IBN(nn.Module):
    """A convolution of which one half goes to an InstanceNorm, the other to a BatchNorm."""

    def __init__(self, *, cut: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.cut = nn.Conv2d(3, 6, 3), cut
        self.instance, self.batch = nn.InstanceNorm2d(2, affine=True), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cut(self.conv(x))
        return torch.cat([self.instance(first.contiguous()), self.batch(second.contiguous())], 1).relu()


BACK: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sum": (lambda: Written(nn.BatchNorm2d(6), lambda a, b: a + b), "fold_batch_norm"),
    "difference": (lambda: Written(nn.BatchNorm2d(6), lambda a, b: torch.sub(a, b, alpha=2)), "fold_batch_norm"),
    "side by side": (lambda: Written(nn.BatchNorm2d(12), lambda a, b: torch.cat([a, b], 1)), "fold_batch_norm"),
    "mean": (lambda: Written(nn.BatchNorm1d(6), lambda a, b: a.mean((2, 3)) + b.mean((2, 3))), "fold_batch_norm"),
    "permuted": (
        lambda: Written(nn.BatchNorm1d(6), lambda a, b: (a + b).permute(0, 2, 3, 1).reshape(-1, 6)), "fold_batch_norm"
    ),
    "frozen instance norm": (
        lambda: Written(nn.InstanceNorm2d(6, affine=True, track_running_stats=True), lambda a, b: a - b), "fold_batch_norm"
    ),
    "norm of a norm": (lambda: Written(nn.Sequential(nn.GroupNorm(2, 6), nn.BatchNorm2d(6)), torch.mul), "fold_batch_norm"),
    "ibn": (lambda: IBN(cut=lambda y: y.split([2, 4], 1)), "fold_batch_norm"),
    "ibn by slices": (lambda: IBN(cut=lambda y: (y[:, :2], y[:, 2:])), "fold_batch_norm"),
    "gain of heads": (
        lambda: Written(Gain(3, 1, 1, 1), lambda a, b: (a - b).unflatten(1, (3, 2))), "fold_layer_scale"
    ),
    "gain in heads": (lambda: Written(Gain(2, 1, 1), lambda a, b: (a - b).unflatten(1, (3, 2))), "fold_layer_scale"),
    "late": (lambda: Written(Late(6), lambda a, b: (a + b).permute(0, 2, 3, 1).reshape(-1, 6)), "fold_layer_scale"),
    "gain of a gate": (lambda: Written(Gain(6, 1, 1), lambda a, b: torch.sigmoid(a) * b), "fold_layer_scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", BACK)
def test_backward_into_every_writer(name: str) -> None:
    make, rule = BACK[name]
    model = randomized(make())
    optimized = normfuse.optimize(model, (images(3, 4, 5),), passes=[rule], dynamic_shapes=None)
    assert optimized.report.fired == {rule: 1}, optimized.report.refusals
    assert "batch_norm" not in ops(optimized)
    assert not optimized.report.rolled_back
    assert optimized.report.verification and optimized.report.verification.error_float64 <= EXACT


@pytest.mark.parametrize(
    ("last", "between", "rule"),
    [
        (Gain(1), lambda a, b: a * a + b, "fold_scalars"),  # s a * s a is s^2 a a
        (Gain(6, 1, 1), lambda a, b: a * a.flip(1), "fold_layer_scale"),
        (Gain(6, 1, 1), lambda a, b: torch.cat([-a[:, 3:], a[:, :3]], 1) + a, "fold_layer_scale"),  # two ways to one channel
        (nn.BatchNorm2d(6), lambda a, b: a + a.flip(2), "fold_batch_norm"),  # the shift would come twice
        (nn.BatchNorm2d(6), lambda a, b: a * b, "fold_batch_norm"),
        (nn.BatchNorm2d(6), lambda a, b: F.pad(a, (1, 1)), "fold_batch_norm"),
        (nn.BatchNorm2d(4), lambda a, b: a[:, :4] + a[:, 2:], "fold_batch_norm"),
    ],
)
def test_what_does_not_go_back(last: nn.Module, between: Any, rule: str) -> None:
    model = randomized(Written(last, between))
    optimized = normfuse.optimize(model, (images(3, 4, 5),), passes=[rule], dynamic_shapes=None, verify=False)
    assert optimized.report.fired == {} and reasons(optimized, rule)


def test_a_tied_table_is_not_copied_unasked() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 6), nn.BatchNorm1d(6)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.norm(self.table(ids))), self.table.weight)

    model, args = randomized(Tied()), (torch.randint(9, (5,)),)
    unasked = normfuse.optimize(model, args, dynamic_shapes=None)
    assert unasked.report.fired == {} and "shared with another call site" in reasons(unasked, "fold_batch_norm")
    asked = normfuse.optimize(model, args, passes=["fold_batch_norm"], dynamic_shapes=None)
    assert asked.report.fired == {"fold_batch_norm": 1} and not asked.report.rolled_back
