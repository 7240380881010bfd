"""By default no pass makes the model more than 1 % larger, and quantized weights stay quantized; by name it may."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normfuse
from tests.support import randomised

ROWS, WIDTH = 500, 24


def held(tensors: object) -> int:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())  # type: ignore[attr-defined]


def grown(model: nn.Module, optimized: normfuse.Optimized) -> float:
    return held(optimized.tensors().values()) / held([*model.parameters(), *model.buffers()])


def ids() -> Tensor:
    return torch.randint(ROWS, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same(model: nn.Module, optimized: nn.Module, *args: Tensor) -> None:
    expected, result = model(*args), optimized(*args)
    assert torch.linalg.vector_norm(result - expected) <= 1e-10 * torch.linalg.vector_norm(expected)


class PreNorm(nn.Module):
    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        self.tokens, self.final = nn.Embedding(ROWS, width), nn.LayerNorm(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))

    def body(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(up(norm(x)).relu())
        return self.final(x)  # type: ignore[no-any-return]


class LinearHead(PreNorm):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.body(ids), self.tokens.weight)


class TurnedHead(PreNorm):
    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids) @ self.tokens.weight.t()


class BiasedHead(PreNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.head = nn.Linear(width, ROWS)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [24, 320])
@pytest.mark.parametrize("kind", [LinearHead, TurnedHead, BiasedHead])
def test_a_tied_table_stays_one(kind: type[PreNorm], width: int) -> None:
    """Narrow: what is looked up is centred at run time. Wide: the head adds the mean of each row."""
    model = randomised(kind(width)).double()
    optimized = normfuse.optimize(model, (ids(),))
    assert grown(model, optimized) <= 1.01
    assert sum(t.shape in ((ROWS, width), (width, ROWS)) for t in optimized.tensors().values()) == 1
    assert optimized.report.fired["layer_norm_to_rms_norm"] == 4
    assert not optimized.report.rolled_back
    assert_same(model, optimized, ids())


class Adapted(nn.Module):
    """Adapters on bases: several may share one."""

    def __init__(self, *bases: nn.Linear) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)
        self.a = nn.ModuleList(nn.Linear(WIDTH, 2, bias=False) for _ in bases)
        self.b = nn.ModuleList(nn.Linear(2, WIDTH, bias=False) for _ in bases)

    def forward(self, x: Tensor) -> Tensor:
        for base, a, b in zip(self.bases, self.a, self.b, strict=True):
            x = (base(x) + 0.5 * b(a(x))).tanh()
        return x


def test_adapters_on_a_shared_base_are_refused_and_one_on_its_own_is_merged() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    model = randomised(Adapted(shared, nn.Linear(WIDTH, WIDTH), shared, shared, shared)).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64) + 0.5
    optimized = normfuse.optimize(model, (x,))
    assert optimized.report.fired["merge_lora"] == 1 and grown(model, optimized) <= 1.01
    refused = [r for r in optimized.report.refusals if "larger" in r.reason and r.pass_name == "merge_lora"]
    assert len(refused) == 4 and all("passes=['merge_lora'] does it all the same" in r.reason for r in refused)
    assert_same(model, optimized, x)
    named = normfuse.optimize(model, (x,), passes=["merge_lora"])
    assert named.report.fired == {"merge_lora": 5} and grown(model, named) > 1.5
    assert_same(model, named, x)


class Quantized(nn.Module):
    """int8 with a scale for each row, or two int4 in a byte; multiplied out at each call."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("codes", torch.randint(-100, 100, (WIDTH, WIDTH * bits // 8), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(WIDTH, 1) * 0.01 + 0.01)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        codes: Tensor = self.codes  # type: ignore[assignment]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).reshape(WIDTH, WIDTH) - 3
        return nn.functional.linear(x, codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_stay_quantized(bits: int) -> None:
    first, last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(first, Quantized(bits), nn.ReLU(), nn.LayerNorm(WIDTH), last)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.2, 0.9)
    x = torch.randn(3, WIDTH) + 0.5
    optimized = normfuse.optimize(model.eval(), (x,))
    assert torch.int8 in {t.dtype for t in optimized.tensors().values()} and grown(model, optimized) <= 1.01
    assert optimized.report.fired == {"fold_norm_affine": 1}
    assert any("stays int8" in r.reason and "passes=['bake_weights']" in r.reason for r in optimized.report.refusals)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    named = normfuse.optimize(model, (x,), passes=["bake_weights"])
    assert torch.int8 not in {t.dtype for t in named.tensors().values()}
    torch.testing.assert_close(named(x), model(x), rtol=1e-4, atol=1e-4)
