"""The classic traps of folding, each with the whole table of passes: right, or left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from tests.passes.checking import assert_same, images, ops, randomized, reasons, relative


def everything(model: nn.Module, *args: Any, **options: Any) -> normfuse.Optimized:
    optimized = normfuse.optimize(model, args, **options)
    assert_same(optimized, 1e-10)
    return optimized


# --- one convolution, two norms


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return F.relu(self.a(y)), F.relu(self.b(y))


def test_one_convolution_with_two_norms() -> None:
    optimized = everything(randomized(TwoNorms()), images(3, 6, 6))
    assert ops(optimized)["batch_norm"] == 2
    assert "also read elsewhere" in reasons(optimized, "fold_batch_norm")


class SharedConv(nn.Module):
    """A detection tower: one convolution at each level, a norm of its own per level."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.conv(F.relu(self.a(self.conv(x))))))


def test_one_convolution_called_under_two_norms() -> None:
    model, x = randomized(SharedConv()), images(3, 6, 6)
    kept = everything(model, x)
    assert ops(kept)["batch_norm"] >= 1  # a second weight makes the model larger: that is for who asks for it
    assert "passes=['fold_batch_norm'] does it all the same" in str(reasons(kept, "fold_batch_norm"))
    optimized = normfuse.optimize(model, (x,), passes=["fold_batch_norm"])
    assert not ops(optimized)["batch_norm"]
    assert optimized.report.verification
    assert len([p for p in optimized.parameters() if p.dim() == 4]) == 2  # one weight per call


# --- a convolution's output read twice


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.norm(y)) * torch.sigmoid(y)


def test_a_convolution_read_twice() -> None:
    optimized = everything(randomized(ReadTwice()), images(3, 6, 6))
    assert ops(optimized)["batch_norm"] == 1
    assert "also read elsewhere" in reasons(optimized, "fold_batch_norm")


# --- transposed convolutions


@pytest.mark.parametrize(
    "inputs,outputs,groups", [(6, 6, 1), (6, 6, 2), (6, 6, 6), (6, 4, 2), (4, 6, 2)], ids=lambda n: str(n)
)
def test_transposed_convolutions(inputs: int, outputs: int, groups: int) -> None:
    """(in, out / groups, ...): with in == out nothing but the numbers tells a wrong axis."""
    conv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1, groups=groups)
    optimized = everything(randomized(nn.Sequential(conv, nn.BatchNorm2d(outputs))), images(inputs, 5, 6))
    assert ops(optimized) == {"conv_transpose2d": 1}
    [weight] = [p for p in optimized.parameters() if p.dim() == 4]
    assert weight.shape == conv.weight.shape


# --- linear, then BatchNorm1d on 3-D input


class Tokens(nn.Module):
    """The norm's channels are tokens here (axis 1), not the linear's outputs, unless they are transposed."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.transposed = nn.Linear(5, 7), nn.BatchNorm1d(7), transposed

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.transpose(1, 2)).transpose(1, 2) if self.transposed else self.norm(y)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_then_a_norm_of_a_sequence(transposed: bool) -> None:
    optimized = everything(randomized(Tokens(transposed=transposed)), torch.randn(2, 7, 5) + 0.3)
    assert ops(optimized)["batch_norm"] == (0 if transposed else 1)


# --- tied heads, shared modules


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.inner, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) * 6**0.5
        return self.head(self.norm(x + torch.tanh(self.linear(self.inner(x)))))


def test_a_tied_head_keeps_its_table() -> None:
    model = randomized(Tied())
    table = model.head.weight.clone()
    everything(model, torch.randint(11, (2, 5)))
    everything(model, torch.randint(11, (2, 5)), passes=["fold_norm_affine", "fold_scalars", "layer_norm_to_rms_norm"])
    assert torch.equal(model.tokens.weight, table) and model.head.weight is model.tokens.weight


class CalledTwice(nn.Module):
    """One block at two places, before a norm that each call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return F.relu(self.norm(self.conv(self.other(y))))


def test_a_module_called_twice() -> None:
    model = randomized(CalledTwice())
    optimized = everything(model, images(3, 6, 6))
    assert ops(optimized)["batch_norm"] == 1  # the one in front of zero padding
    assert "zero padding" in reasons(optimized, "fold_batch_norm_forward")


# --- a norm that the residual reads


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.last = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(torch.tanh(y + torch.tanh(self.linear(y))))


def test_a_norm_read_by_the_residual() -> None:
    optimized = everything(randomized(PostNorm()), torch.randn(2, 3, 6) + 0.4)
    assert "also read by add" in reasons(optimized, "fold_norm_affine")


# --- a zero-padded convolution behind a shift


class Shifted(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(torch.tanh(x)))


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "norm,pass_name", [(nn.BatchNorm2d, "fold_batch_norm_forward"), (ChannelNorm, "fold_norm_affine")], ids=["bn", "ln"]
)
def test_a_zero_padded_convolution_behind_a_shift(norm: Callable[[int], nn.Module], pass_name: str) -> None:
    model = randomized(Shifted(norm(4)))
    optimized = everything(model, images(4, 6, 6))
    assert pass_name not in optimized.report.fired
    assert "zero padding" in reasons(optimized, pass_name)


def test_the_plain_fold_in_front_of_zero_padding_is_caught() -> None:
    """The control: what a pass that overlooked the border would do, the verification rejects."""
    model = randomized(Shifted(nn.BatchNorm2d(4))).double()
    scale = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)
    shift = model.norm.bias - model.norm.running_mean * scale

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 3, padding=1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.tanh(x))

    wrong, x = Wrong(), images(4, 6, 6).double()
    with torch.no_grad():
        wrong.conv.weight.copy_(model.conv.weight * scale[:, None, None])
        wrong.conv.bias.copy_(model.conv.bias + (model.conv.weight * shift[:, None, None]).sum((1, 2, 3)))
        inside = (..., slice(1, -1), slice(1, -1))
        assert relative(wrong(x)[inside], model(x)[inside]) <= 1e-12
    assert not normfuse.verify(model, wrong.eval(), (x,))


# --- (1 + w) gains


class Gemma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))
        self.q, self.k = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = (y * (1.0 + self.weight.to(y.dtype))).type_as(x)
        return self.q(y), self.k(y)


def test_gains_of_one_plus_w() -> None:
    optimized = everything(randomized(Gemma()), torch.randn(2, 3, 6) + 0.4)
    assert optimized.report.fired["fold_norm_affine"] == 1


# --- half precision


class Mixed(nn.Module):
    """Everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.side = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(3, 6, 1)
        self.pre, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x)) + self.side(x)).flatten(2).transpose(1, 2)
        return y + self.gain * self.down(F.gelu(self.up(self.pre(y) * 0.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    optimized = everything(randomized(Mixed()).to(dtype), images(3, 6, 6).to(dtype))
    assert set(optimized.report.fired) >= {"fold_batch_norm", "merge_branches", "fold_layer_scale", "fold_scalars"}
    assert {p.dtype for p in optimized.parameters()} == {dtype}


class LateScale(nn.Module):
    """The factor is computed from a parameter after its tensor has been read: weights must not wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(6, 6), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).view(x.shape[0], -1, 2, 3)
        return torch.softmax(y.transpose(1, 2) / torch.sqrt(self.temperature.abs() * 3), -1)


def test_a_factor_that_is_computed_late() -> None:
    optimized = everything(randomized(LateScale()), torch.randn(2, 4, 6) + 0.4)
    assert optimized.report.fired["fold_scalars"] == 1
