"""The ledger on another checkpoint: what optimizing that one gives, bit for bit, or a reason why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.models import convnext, gpt, llama, mobilenet, neox, repvgg, resnet, swin
from tests.support import randomised

SPECIMENS = (gpt, llama, neox, swin, resnet, repvgg, mobilenet, convnext)
Case = tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]


class Lora(nn.Module):
    """A linear with an adapter, the way peft adds it, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.base = nn.LayerNorm(12), nn.Linear(12, 10)
        self.a, self.b = nn.Linear(12, 3, bias=False), nn.Linear(3, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.base(x) + self.b(self.a(x)) * 0.5


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=32, **ids))


def specimen(module: Any) -> Callable[[], Case]:
    config = "small" if "small" in module.CONFIGS else next(iter(module.CONFIGS))
    return lambda: (lambda: module.build(config), *module.example(config))


def on_tokens() -> Case:
    return gpt2, (), {"input_ids": torch.randint(0, 97, (2, 9)), "use_cache": False}


CASES: dict[str, tuple[Callable[[], Case], tuple[str, ...] | None]] = {
    "GPT-2": (on_tokens, None),
    "LoRA": (lambda: (Lora, (torch.randn(4, 12),), {}), None),
    **{m.__name__.rpartition(".")[2]: (specimen(m), None) for m in SPECIMENS},
    "llama, rotated and scaled": (specimen(llama), ("fold_norm_affine", "rotate_residual", "migrate_scales")),
    "gpt, one dimension less": (
        specimen(gpt), ("layer_norm_to_rms_norm", "fold_norm_affine", "fold_value_bias", "rms_norm_to_crms_norm"),
    ),
    "gpt, singular vectors": (specimen(gpt), ("clover",)),
    "repvgg, scaled": (specimen(repvgg), ("fold_batch_norm", "merge_branches", "migrate_scales")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_replayed_is_what_optimizing_gives(case: str) -> None:
    make, passes = CASES[case]
    build, args, kwargs = make()
    one, other = randomised(build(), seed=1), randomised(build(), seed=2)
    for (_, mine), (name, theirs) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        if name not in other.state_dict():  # a buffer that no checkpoint holds is the same in every model
            theirs.copy_(mine)
    first, second = (normfuse.optimize(m, args, kwargs, passes=passes) for m in (one, other))
    assert first.report.fired == second.report.fired and first.report.weights
    state = other.state_dict()
    replayed = normfuse.replay(first.report.weights, state)
    assert replayed.keys() == second.report.weights.keys()
    buffers = dict(other.named_buffers())
    for name, wanted in second.tensors().items():
        got = replayed[name] if name in replayed else state.get(name, buffers.get(name))
        assert got is None or torch.equal(got, wanted), name
    assert any(not torch.equal(replayed[name], first.tensors()[name]) for name in replayed)


# --- refuses


def ledger_of(model: nn.Module, *args: Any) -> Any:
    return normfuse.optimize(model, args).report.weights


@pytest.mark.parametrize("case", ["GPT-2", "llama", "resnet", "repvgg", "mobilenet", "LoRA"])
def test_missing_and_misshapen_tensors_are_named(case: str) -> None:
    build, args, kwargs = CASES[case][0]()
    model = randomised(build())
    ledger, state = normfuse.optimize(model, args, kwargs).report.weights, model.state_dict()
    source = next(s for w in ledger.values() for s in w.sources if s in state and state[s].dim() > 0)
    names = {n for n in state if state[n].data_ptr() == state[source].data_ptr()}
    with pytest.raises(normfuse.NormfuseError, match=r"the checkpoint has no '.*', which '.*' is computed from"):
        normfuse.replay(ledger, {name: t for name, t in state.items() if name not in names})
    wrong = {name: torch.cat([state[name]] * 2) for name in names}
    with pytest.raises(normfuse.NormfuseError, match=r"has shape \[.*\] in the checkpoint, not \["):
        normfuse.replay(ledger, state | wrong)


class Masked(nn.Module):
    """Attention whose causal mask is a buffer of the checkpoint, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2) / 12**0.5).masked_fill(~self.mask, float("-inf"))
        return self.out(scores.softmax(-1) @ v)


def test_a_mask_that_became_part_of_the_graph_must_be_the_same() -> None:
    model, x = randomised(Masked()), torch.randn(2, 6, 12)
    result = normfuse.optimize(model, (x,))
    assert not any("mask" in name for name in result.tensors())
    state = model.state_dict()
    assert normfuse.replay(result.report.weights, state)
    with pytest.raises(normfuse.NormfuseError, match="'mask' differs in the checkpoint, and its values decided"):
        normfuse.replay(result.report.weights, state | {"mask": torch.ones(6, 6, dtype=torch.bool)})


def test_tied_tensors_must_be_alike() -> None:
    model, (args, kwargs) = gpt.build("small"), gpt.example("small")
    ledger, state = normfuse.optimize(model, args, kwargs).report.weights, model.state_dict()
    tied = [name for name in state if state[name].data_ptr() == state["tokens.weight"].data_ptr()]
    assert len(tied) == 2 and normfuse.replay(ledger, state)
    assert normfuse.replay(ledger, {n: t for n, t in state.items() if n != tied[0]})
    with pytest.raises(normfuse.NormfuseError, match="are tied in the model and differ in the checkpoint"):
        normfuse.replay(ledger, state | {tied[0]: state[tied[0]] + 1})


class Pooled(nn.Module):
    """A BatchNorm whose scale passes a maximum only if it is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.norm(x), 2).flatten(1))


def test_a_sign_that_the_rewrite_rests_on_must_be_the_same() -> None:
    model, x = randomised(Pooled()), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        model.norm.weight.abs_()
    ledger = normfuse.optimize(model, (x,), passes=["fold_batch_norm_forward"]).report.weights
    assert ledger
    state = model.state_dict() | {"norm.weight": -model.norm.weight.detach()}
    with pytest.raises(normfuse.NormfuseError, match="a number whose sign the rewrite rests on has another one in"):
        normfuse.replay(ledger, state)
