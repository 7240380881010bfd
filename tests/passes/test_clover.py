"""clover: value and output, query and key of each head in their common singular vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.models import bert, gpt, llama, neox, vit
from normfuse.models._random import randomized
from normfuse.passes import clover
from normfuse.rewrite import Rule
from tests.support import randomised


def treated(module: Any, rule: str | Rule = "clover", config: Any = "small") -> normfuse.Optimized:
    args, kwargs = module.example(config)
    return normfuse.optimize(module.build(config), args, kwargs, passes=[rule])


def reasons(optimized: normfuse.Optimized) -> str:
    return "\n".join(r.reason for r in optimized.report.refusals)


# --- fires


@pytest.mark.parametrize(("module", "count"), [(gpt, 4), (vit, 4), (bert, 4), (llama, 2), (neox, 2)])
def test_fires_for_each_pair_of_each_attention(module: Any, count: int) -> None:
    assert treated(module).report.fired == {"clover": count}


def test_either_alone() -> None:
    for options in ({"values": False}, {"scores": False}):
        assert treated(gpt, clover.configured(**options)).report.fired == {"clover": 2}


# --- refuses


@pytest.mark.parametrize("module", [llama, neox])
def test_refuses_queries_behind_rope(module: Any) -> None:
    result = treated(module, clover.configured(values=False))
    assert result.report.fired == {}
    assert "queries or keys do not come straight from a projection: RoPE or a norm is between" in reasons(result)


class Attention(nn.Module):
    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        width = 6 if variant == "narrow" else 24
        self.q, self.k, self.v = (nn.Linear(width, 24) for _ in range(3))
        self.o, self.other = nn.Linear(24, width), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Any:
        heads = 2
        q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.variant == "tapped":
            return self.o(y), torch.tanh(v)
        return self.o(y) + self.other(y).sin() if self.variant == "two readers" else self.o(y)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("tapped", "the values are also read by tanh"),
        ("two readers", "several projections read the heads"),
        ("narrow", "a head of 12 channels is wider than what it is computed from"),
    ],
)
def test_refuses(variant: str, reason: str) -> None:
    model = randomized(lambda: Attention(variant), 1)
    x = torch.randn(2, 5, 6 if variant == "narrow" else 24) + 0.3
    result = normfuse.optimize(model, (x,), passes=[clover.configured(scores=False)])
    assert result.report.fired == {}
    assert reason in reasons(result)


# --- same function


@pytest.mark.parametrize("module", [gpt, vit, bert, llama, neox])
def test_same_function(module: Any) -> None:
    verdict = treated(module).report.verification
    assert verdict and verdict.error_float64 < 1e-10 and verdict.error_ratio <= 2


def test_gpt2() -> None:
    """METHODS' acceptance: no RoPE, biases, the full decomposition."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
    model = randomised(GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=32, **ids)))
    given = {"input_ids": torch.randint(0, 97, (2, 9)), "use_cache": False}
    report = normfuse.optimize(model, (), given, passes=["clover"]).report
    assert report.fired == {"clover": 6} and report.refusals == []
    assert report.verification and report.verification.error_float64 <= 1e-10


def test_grouped_heads_stand_side_by_side() -> None:
    config = llama.Config(heads=8, kv_heads=2)
    report = treated(llama, config=config).report
    assert report.fired == {"clover": 2} and report.verification


def test_singular_values_are_shared_and_sorted() -> None:
    model = randomized(lambda: Attention("plain"), 1)
    x = torch.randn(2, 5, 24) + 0.3
    before = model.o.weight @ model.v.weight
    report = normfuse.optimize_(model, (x,), passes=["clover"])
    assert report.fired == {"clover": 2}
    assert set(report.weights) == {f"{p}.{n}" for p in "qkv" for n in ("weight", "bias")} | {"o.weight"}
    for head in (slice(0, 12), slice(12, 24)):
        value = torch.cat([model.v.weight[head], model.v.bias[head, None]], -1)
        left, right = value.norm(dim=-1), model.o.weight[:, head].norm(dim=0)
        torch.testing.assert_close(left, right)
        assert bool((left.diff() <= 1e-6).all())
        gram = value @ value.T
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.o.weight @ model.v.weight, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    args, _ = gpt.example("small")
    report = normfuse.optimize(gpt.build("small").to(dtype), args, passes=["clover"]).report
    assert report.fired == {"clover": 4} and report.verification


# --- a mutant fails


def test_a_lost_singular_value_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = clover._three

    def wrong(found: Any) -> Any:
        u, s, vt = right(found)
        return u, s * (1 + 1e-6), vt

    monkeypatch.setattr(clover, "_three", wrong)
    result = treated(vit)
    assert result.report.fired == {}
    assert "rolled back, the float64 error" in reasons(result)


# --- idempotent


def test_again_changes_nothing_but_signs() -> None:
    model = randomized(lambda: Attention("plain"), 1)
    x = torch.randn(2, 5, 24) + 0.3
    normfuse.optimize_(model, (x,), passes=["clover"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    normfuse.optimize_(model, (x,), passes=["clover"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.abs(), before[name].abs(), rtol=1e-3, atol=1e-4)
