"""merge_branches: RepVGG, MobileOne, ACNet, DBB, FastViT, RepViT and home-made blocks, found in the graph alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

PASS = "merge_branches"
BOTH = ("fold_batch_norm", PASS)


def conv_norm(inputs: int, outputs: int, kernel: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **{"bias": False, **options}), nn.BatchNorm2d(outputs))


class Rep(nn.Module):
    """3x3, 1x1 and identity, each with its BatchNorm."""

    def __init__(self, inputs: int = 8, outputs: int = 8, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.point = conv_norm(inputs, outputs, 1, stride=stride, groups=groups)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        return F.relu(y if self.skip is None else y + self.skip(x))


class MobileOne(nn.Module):
    def __init__(self, channels: int = 8, copies: int = 4) -> None:
        super().__init__()
        self.copies = nn.ModuleList(conv_norm(channels, channels, 3, padding=1, groups=channels) for _ in range(copies))
        self.scale = conv_norm(channels, channels, 1, groups=channels)
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(x) + self.skip(x)
        for branch in self.copies:
            y = y + branch(x)
        return F.relu(y)


class Asymmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.row, self.column = (
            conv_norm(6, 4, kernel, padding=padding)
            for kernel, padding in ((3, 1), ((1, 3), (0, 1)), ((3, 1), (1, 0)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.row(x) + self.column(x)


class Diverse(nn.Module):
    """DBB. `border`: the input is padded, so that the border of 1x1 and norm is the norm of zero; else zeros are."""

    def __init__(self, *, border: bool = True) -> None:
        super().__init__()
        outside = 1 if border else 0
        self.dense = conv_norm(6, 4, 3, padding=1)
        self.point = conv_norm(6, 4, 1)
        self.first, self.second = conv_norm(6, 6, 1, padding=outside), conv_norm(6, 4, 3, padding=1 - outside)
        self.before, self.pool = conv_norm(6, 4, 1, padding=outside), nn.AvgPool2d(3, 1, 1 - outside)
        self.after = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.after(self.pool(self.before(x)))
        return self.dense(x) + self.point(x) + self.second(self.first(x)) + pooled


class RepMixer(nn.Module):
    """FastViT: x + scale * (mixer(x) - norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point = conv_norm(6, 6, 3, padding=1, groups=6), conv_norm(6, 6, 1, groups=6)
        self.skip, self.norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (self.dense(x) + self.point(x) + self.skip(x) - self.norm(x))


class NormOnTop(nn.Module):
    """RepViT: the norm stands over the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point = conv_norm(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1, groups=6)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x) + self.point(x) + x)


class Dilated(nn.Module):
    """UniRepLKNet: a large kernel and dilated small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.large = conv_norm(6, 6, 7, padding=3, groups=6)
        self.wide = conv_norm(6, 6, 3, padding=2, dilation=2, groups=6)
        self.wider = conv_norm(6, 6, 3, padding=3, dilation=3, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.wide(x) + self.wider(x)


class Home(nn.Module):
    """1-D, alphas, numbers, a number per channel, two kinds of groups, a function of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 4, 5, padding="same"), nn.Conv1d(4, 4, 2, padding="same", groups=2)
        self.gain, self.shift = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(1, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.a(x) * self.gain, self.b(x) / 3 + self.shift, alpha=0.7) - 0.25 * x


class Residual(nn.Module):
    """Parallel linears of one input, and that input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) - self.b(x) + x


BLOCKS = {
    **{
        f"repvgg-{groups}-{stride}": (lambda g=groups, s=stride: Rep(groups=g, stride=s), 8)
        for groups in (1, 4, 8)
        for stride in (1, 2)
    },
    "repvgg-wider": (lambda: Rep(8, 12), 8),
    "mobileone": (MobileOne, 8),
    "acnet": (Asymmetric, 6),
    "dbb": (Diverse, 6),
    "fastvit": (RepMixer, 6),
    "repvit": (NormOnTop, 6),
    "dilated": (Dilated, 6),
}


# --- fires


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_becomes_one_convolution(name: str) -> None:
    make, channels = BLOCKS[name]
    optimized = run(randomized(make()), [images(channels, 9, 10)], *BOTH)
    assert {op for op in ops(optimized) if op != "relu"} == {"conv2d"}
    assert ops(optimized)["conv2d"] == 1
    assert optimized.report.fired[PASS] == 1
    assert_same(optimized)


@pytest.mark.parametrize("name", BLOCKS)
def test_norms_that_nothing_folded_merge_as_well(name: str) -> None:
    make, channels = BLOCKS[name]
    optimized = run(randomized(make()), [images(channels, 9, 10)], PASS)
    assert ops(optimized)["conv2d"] == 1 and not ops(optimized)["batch_norm"]
    assert_same(optimized)


def test_home_made_sums_merge() -> None:
    optimized = run(randomized(Home()), [torch.randn(2, 4, 9) + 0.5], PASS)
    assert ops(optimized) == {"conv1d": 1}
    assert_same(optimized)
    optimized = run(randomized(Residual()), [torch.randn(2, 5, 6) + 0.5], PASS)
    assert ops(optimized) == {"linear": 1}
    assert_same(optimized)


@pytest.mark.parametrize("specimen", ["small", "small-grouped"])
def test_the_specimen_has_one_convolution_per_block(specimen: str) -> None:
    from normfuse.models import repvgg

    optimized = run(repvgg.build(specimen), repvgg.example(specimen)[0], *BOTH)
    assert ops(optimized) == {"conv2d": 5, "relu": 5, "mean": 1, "linear": 1}
    assert_same(optimized, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name,blocks", [("repvgg_a0", 22), ("mobileone_s0", 43)])
def test_timm_models_have_one_convolution_per_block(name: str, blocks: int) -> None:
    from tests.zoo.entry import randomise, seeded
    from tests.zoo.torchvision_stub import import_timm

    timm = import_timm()
    example = (images(3, 64, 64),)
    with seeded(name):
        model = randomise(timm.create_model(name).eval(), (example, {}))
    optimized = run(model, example, "remove_inference_noops", *BOTH)
    found = ops(optimized)
    assert found["conv2d"] == found["relu"] == blocks
    assert not found["add"] and not found["batch_norm"]
    assert_same(optimized, 1e-10)


@pytest.mark.slow
def test_fastvit_has_one_convolution_per_branched_block() -> None:
    """Stem 3, four in each of ten blocks (mixer, 7x7, two 1x1), two in each of three downsamplings, head 1, its gate 2."""
    import normfuse
    from tests.zoo.entry import randomise, seeded
    from tests.zoo.torchvision_stub import import_timm

    example = (images(3, 64, 64),)
    with seeded("fastvit_t8"):
        model = randomise(import_timm().create_model("fastvit_t8").eval(), (example, {}))
    optimized = normfuse.optimize(model, example, dynamic_shapes=None)
    assert ops(optimized)["conv2d"] == 3 + 10 * 4 + 3 * 2 + 1 + 2
    assert not ops(optimized)["batch_norm"]
    assert_same(optimized, 1e-10)


def test_a_norm_read_twice_behind_a_convolution_merges_backward() -> None:
    """RepBN(conv(x)) = BN(y) + 0.7 y: W' = a W, b' = a b + c, with 0.7 b in it."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.eta = nn.Conv2d(3, 5, 2, 2), nn.BatchNorm2d(5), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + self.eta * y

    model, x = randomized(Embedded()).double(), images(3, 8, 8).double()
    optimized = run(model, [x], *BOTH)
    assert ops(optimized) == {"conv2d": 1}
    assert_same(optimized)
    with torch.no_grad():  # what the published merge drops: eta * b
        wrong = optimized(x) - (model.eta * model.conv.bias)[None, :, None, None]
        error = (wrong - model(x)).abs().max()
        assert torch.isclose(error, (model.eta * model.conv.bias).abs().max())


def test_a_block_behind_a_wide_kernel_does_not_grow_into_it() -> None:
    """Without a nonlinearity between, a 1x1 block could be put into the 7x7 in front of it, at many times the cost."""

    class Downsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(8, 8, 7, 2, 3, groups=8)
            self.point, self.skip = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.wide(x)
            return F.gelu(self.point(y) + self.skip(y))

    import normfuse

    optimized = normfuse.optimize(randomized(Downsampling()), (images(8, 16, 16),))
    assert ops(optimized) == {"conv2d": 2, "gelu": 1}
    assert_same(optimized)


# --- refuses


def test_a_nonlinearity_between_the_branches_stays() -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + F.relu(self.b(x))

    optimized = run(randomized(Bent()), [images(4, 6, 6)], PASS)
    assert not optimized.report.fired
    assert "summands are maps of different tensors" in reasons(optimized, PASS)


def test_a_shifted_result_padded_by_zeros_keeps_its_border() -> None:
    """The 1x1 has a bias: what the 3x3 sees at the border is 0, not that bias. Merging would be wrong there alone."""
    model, x = randomized(Diverse(border=False)).double(), images(6, 8, 8).double()
    optimized = run(model, [x], *BOTH)
    assert_same(optimized)
    assert ops(optimized)["conv2d"] == 4  # the parallel two are one, and 1x1, 3x3 and the pooled 1x1 stay
    with torch.no_grad():
        right = Diverse(border=True).double().eval()
        right.load_state_dict(model.state_dict())
        inside = (..., slice(1, -1), slice(1, -1))
        assert relative(right(x)[inside], model(x)[inside]) <= 1e-12
        assert relative(right(x), model(x)) >= 1e-2


def test_pools_that_do_not_count_their_padding_stay() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.pool(x)

    assert not run(randomized(Pooled()), [images(4, 6, 6)], PASS).report.fired


def test_one_kernel_that_would_cost_more_is_not_made_unasked() -> None:
    class Dear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.depth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            return self.point(x) + self.depth(x)

    import normfuse

    model, args = randomized(Dear()), (images(8, 6, 6),)
    unasked = normfuse.optimize(model, args)
    assert PASS not in unasked.report.fired
    assert "multiplications" in reasons(unasked, PASS)
    asked = run(model, args, PASS)
    assert asked.report.fired == {PASS: 1}
    assert_same(asked)


def test_reflecting_padding_is_another_tensor() -> None:
    class Reflecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    optimized = run(randomized(Reflecting()), [images(4, 6, 6)], PASS)
    assert not optimized.report.fired
    assert "summands are maps of different tensors" in reasons(optimized, PASS)


# --- same function, in other dtypes too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_as_good_as_before(dtype: torch.dtype) -> None:
    optimized = run(randomized(Rep()).to(dtype), [images(8, 6, 6).to(dtype)], *BOTH)
    assert optimized.report.fired[PASS] == 1
    assert_same(optimized)


def test_free_sizes_stay_free() -> None:
    model = randomized(Rep())
    optimized = run(model, [images(8, 9, 10)], *BOTH)
    x = images(8, 12, 7, batch=3)
    with torch.no_grad():
        assert relative(optimized(x), model(x)) < 1e-5


# --- a mutant fails, idempotent


def test_a_mutant_fails() -> None:
    assert_mutant_fails(randomized(Rep()), [images(8, 6, 6)], *BOTH)


def test_a_second_run_finds_nothing() -> None:
    args = [images(6, 8, 8)]
    assert_idempotent(run(randomized(Diverse()), args, *BOTH), args, *BOTH)
