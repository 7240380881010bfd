"""fold_scalars: attention scales, embedding scales, LayerNorm Scaling, Fixup, NF-nets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
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

PASS = "fold_scalars"


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Explicit attention with a temperature; `rotary`: positions of the input's length; `fused`: one qkv projection."""

    def __init__(self, *, rotary: bool = False, fused: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36) if fused else nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.temperature = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(6) if normed else nn.Identity()
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        whole = self.qkv(x).chunk(3, -1) if isinstance(self.qkv, nn.Linear) else [p(x) for p in self.qkv]
        q, k, v = (p.view(b, t, 2, 6).transpose(1, 2) for p in whole)
        q = self.norm(q)
        if self.rotary:
            angles = torch.arange(t, device=x.device)[:, None] * 0.3 ** torch.arange(6, device=x.device)
            q, k = (rotated(p, angles.cos(), angles.sin()) for p in (q, k))
        logits = (q @ k.transpose(-2, -1)) * 6**-0.5 / self.temperature
        return (torch.softmax(logits, -1) @ v).transpose(1, 2).reshape(b, t, 12)


class Logits(nn.Module):
    """Queries times keys, capped: no softmax, so no attention to raise; grouped keys from one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.temperature = nn.Linear(12, 18), nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k = self.qk(x).split([12, 6], -1)
        q, k = (p.view(b, t, -1, 6).transpose(1, 2) for p in (q, k))
        return torch.tanh(q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 6**-0.5 / self.temperature)


class Embedded(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Parameter(torch.ones(1, 5, 8))
        self.head, self.tied = nn.Linear(8, 20, bias=False), tied
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh((self.tokens(ids) + self.places) * 8**0.5))


class Scaled(nn.Module):
    """LayerNorm Scaling: both norms of layer l are divided by sqrt(l)."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2 * layers))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        for place, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=True)):
            x = x + torch.tanh(linear(norm(x) / (place // 2 + 1) ** 0.5))
        return x


class Fixup(nn.Module):
    """A basic block: a scalar bias before each convolution and activation, a multiplier at the end."""

    def __init__(self, *, before: bool = True) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(4))
        self.multiplier, self.before = nn.Parameter(torch.ones(1)), before

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x + self.bias[0] if self.before else x)
        y = F.relu(y + self.bias[1])
        y = self.b(y + self.bias[2] if self.before else y)
        return F.relu(y * self.multiplier + self.bias[3] + x)


class NormFree(nn.Module):
    """x + alpha f(beta act(x)), f with a gate at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.gate, self.skip = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.gelu(self.a(F.gelu(x) * 0.9)) * 1.7)
        y = 2.0 * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))) * y
        return x + 0.2 * (y * self.skip)


def tokens() -> Tensor:
    return torch.randn(2, 5, 12) + 0.4


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "attention": (Attention, tokens, 1),  # its scale is the raised attention's own, the temperature is not
    "fused attention": (lambda: Attention(fused=True), tokens, 1),
    "normed queries": (lambda: Attention(normed=True), tokens, 1),
    "logits": (Logits, tokens, 2),
    "embedding": (Embedded, lambda: torch.randint(20, (2, 5)), 1),
    "layer norm scaling": (Scaled, lambda: torch.randn(2, 5, 8) + 0.4, 22),
    "fixup": (lambda: Fixup(before=False), lambda: images(4, 6, 6), 3),
}


# --- fires, same function


@pytest.mark.parametrize("name", CASES)
def test_scalars_go_into_the_weights(name: str) -> None:
    make, example, count = CASES[name]
    optimized = run(randomized(make()), [example()], "remove_inference_noops", PASS)
    assert optimized.report.fired[PASS] == count, optimized.report.refusals
    assert not {"mul", "div"} & set(ops(optimized))
    assert_same(optimized)


def test_rotary_positions_let_a_scale_through() -> None:
    optimized = run(randomized(Attention(rotary=True)), [tokens()], PASS, dynamic_shapes=None)
    assert optimized.report.fired == {PASS: 1}
    assert_same(optimized)


def test_norm_free_networks_keep_the_factors_of_their_gates() -> None:
    """A convolution that its own gate reads cannot take what the gated product is multiplied by."""
    optimized = run(randomized(NormFree()), [images(4, 6, 6)], PASS)
    assert optimized.report.fired == {PASS: 2}
    assert "also read by mean" in reasons(optimized, PASS)
    assert_same(optimized)


def test_a_forgotten_shift_fails() -> None:
    """LayerNorm Scaling divides gain and shift."""
    model, x = randomized(Scaled()).double(), torch.randn(2, 5, 8).double() + 0.4
    optimized = run(model, [x], PASS)
    assert_same(optimized, 1e-13)
    with torch.no_grad():
        expected = model(x)
        wrong = x
        for place, (norm, linear) in enumerate(zip(model.norms, model.linears, strict=True)):
            scale = (place // 2 + 1) ** -0.5
            y = F.layer_norm(wrong, [8], norm.weight * scale, norm.bias, norm.eps)
            wrong = wrong + torch.tanh(linear(y))
        assert relative(wrong, expected) >= 1e-2


def test_a_scalar_before_a_zero_padded_convolution_is_repaired_when_asked_for() -> None:
    model, x = randomized(Fixup()).double(), images(4, 7, 8).double()
    unasked = normfuse.optimize(model, (x,))
    assert "no bias that could take the shift" in reasons(unasked, PASS)
    asked = run(model, [x], PASS, dynamic_shapes=None)
    assert asked.report.fired[PASS] == 5
    assert_same(asked)
    with torch.no_grad():
        naive = F.conv2d(x, model.a.weight, model.bias[0] * model.a.weight.sum((1, 2, 3)), padding=1)
        right = model.a(x + model.bias[0])
        assert relative(naive[..., 1:-1, 1:-1], right[..., 1:-1, 1:-1]) <= 1e-12
        assert relative(naive, right) >= 1e-2


# --- refuses


def test_a_table_that_the_head_shares_stays_unless_asked_for() -> None:
    model, args = randomized(Embedded(tied=True)), (torch.randint(20, (2, 5)),)
    unasked = normfuse.optimize(model, args)
    assert PASS not in unasked.report.fired
    assert "shared with another call site" in reasons(unasked, PASS)
    asked = run(model, args, PASS)
    assert asked.report.fired == {PASS: 1}
    assert_same(asked)
    assert sum(p.numel() for p in asked.parameters()) == sum(p.numel() for p in model.parameters()) + 160


def test_a_tensor_that_is_read_elsewhere_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.tanh(y) + 0.5 * y

    optimized = run(randomized(Read()), [torch.randn(3, 8)], PASS)
    assert not optimized.report.fired
    assert "also read by" in reasons(optimized, PASS)


def test_a_nonlinearity_keeps_its_scale() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * torch.sigmoid(self.linear(x)))

    optimized = run(randomized(Swish()), [torch.randn(3, 8)], PASS)
    assert not optimized.report.fired
    assert "sigmoid" in reasons(optimized, PASS)


# --- a mutant fails, idempotent


def test_a_mutant_fails() -> None:
    assert_mutant_fails(randomized(Attention()), [tokens()], PASS)


def test_a_second_run_finds_nothing() -> None:
    args = [tokens()]
    assert_idempotent(run(randomized(Attention()), args, PASS), args, PASS)
