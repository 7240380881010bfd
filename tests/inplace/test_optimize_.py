"""`optimize_`: the user's own modules change, or nothing does."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfuse
from normfuse import nn as own
from normfuse.inplace import optimize as way
from normfuse.models import gpt
from normfuse.models._random import randomized
from normfuse.passes import layer_norm_to_rms_norm

CENTRE = "layer_norm_to_rms_norm"

TEXT: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
HEADS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=80, **TEXT))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=80, **HEADS, **TEXT)
    return OPTForCausalLM(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, intermediate_size=48, **HEADS, **TEXT))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(intermediate_size=48, image_size=32, patch_size=8, **HEADS))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    return ResNetForImageClassification(config)


def ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(3)), "use_cache": False}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) + 0.3}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Every tensor's identity and value, every module's identity and class."""
    tensors = {n: (id(t), t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return {"tensors": tensors, "modules": {n: (id(m), type(m)) for n, m in model.named_modules()}}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    assert after["modules"] == before["modules"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], value)


# --- Hugging Face models


@pytest.mark.parametrize("make", [gpt2, opt, llama])
def test_generation_returns_the_same_tokens(make: Callable[[], nn.Module]) -> None:
    model, example = randomized(make, 1), ids()
    prompt = {"input_ids": example["input_ids"], "max_new_tokens": 50, "do_sample": False}
    before: Tensor = model.generate(**prompt)  # type: ignore[operator]
    report = normfuse.optimize_(model, (), example)
    assert report.verification and report.verification.error_float64 < 1e-10
    assert report.fired["fold_norm_affine"] >= 4
    assert torch.equal(model.generate(**prompt), before)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "example", "kind"),
    [(gpt2, ids, own.RMSNorm), (opt, ids, own.RMSNorm), (llama, ids, own.RMSNorm), (vit, image, own.RMSNorm),
     (resnet, image, nn.Identity)],
)  # fmt: skip
def test_the_modules_are_other_ones_and_the_state_dict_goes_round(
    make: Callable[[], nn.Module], example: Callable[[], dict[str, Any]], kind: type[nn.Module]
) -> None:
    model, reference = randomized(make, 1), randomized(make, 1)
    tied = [CENTRE, "fold_norm_affine"] if make in (gpt2, opt) else None  # by default no second table comes into being
    report = normfuse.optimize_(model, (), example(), passes=tied)
    assert not any(isinstance(m, nn.LayerNorm | nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, kind) for m in model.modules()) >= 5
    assert report.verification and report.verification.error_ratio <= 2
    with torch.no_grad():
        got, wanted = model(**example()).logits, reference(**example()).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0)
    model.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    with torch.no_grad():
        assert torch.equal(model(**example()).logits, got)


def test_report_weights_are_named_as_the_model_names_them_now() -> None:
    model, other = randomized(gpt2, 1), randomized(gpt2, 2)
    report = normfuse.optimize_(model, (), ids())
    names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert set(report.weights) <= set(names)
    replayed = normfuse.replay(report.weights, other.state_dict())
    kept = {k: v for k, v in other.state_dict().items() if k in model.state_dict()}
    model.load_state_dict(model.state_dict() | kept | replayed)
    with torch.no_grad():
        torch.testing.assert_close(model(**ids()).logits, other(**ids()).logits, rtol=1e-4, atol=1e-4)


# --- tied weights


def test_a_tied_head_parts_from_its_embedding() -> None:
    model = gpt.build("small")
    assert model.head.weight is model.tokens.weight  # type: ignore[union-attr]
    normfuse.optimize_(model, gpt.example("small")[0], passes=[layer_norm_to_rms_norm.configured(tied="copy")])
    assert model.head.weight is not model.tokens.weight  # type: ignore[union-attr]


def test_a_tie_that_need_not_part_stays() -> None:
    model = randomized(lambda: gpt.GPT(gpt.CONFIGS["small"]), 0)
    normfuse.optimize_(model, gpt.example("small")[0], passes=["fold_norm_affine"], disable=["layer_norm_to_rms_norm"])
    report = normfuse.optimize_(model, gpt.example("small")[0], passes=[])
    assert report.fired == {} and report.weights == {}


class ReadsTheTable(nn.Module):
    """A tied head without a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(19, 16)
        self.mix = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return nn.functional.linear(self.norm(x + self.mix(self.norm(x))), self.tokens.weight)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 19, (2, 5), generator=torch.Generator().manual_seed(0)),)


def test_one_name_that_would_need_two_values_is_refused() -> None:
    model = randomized(ReadsTheTable, 1)
    before = fingerprint(model)
    report = normfuse.optimize_(model, tokens(), passes=[CENTRE])
    assert report.fired == {}
    reasons = {r.reason for r in report.refusals if r.pass_name == CENTRE}
    assert any("tokens.weight is used at several places that need different values now" in reason for reason in reasons)
    assert_untouched(model, before)


class NormTwice(nn.Module):
    """One norm module before a projection and at the end, where its gain must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear(self.norm(x)))


def test_a_norm_module_that_must_stay_at_one_of_its_calls_is_refused() -> None:
    model = randomized(NormTwice, 1)
    before = fingerprint(model)
    report = normfuse.optimize_(model, (torch.randn(3, 8) + 1,))
    assert report.fired == {}
    assert any("the module norm is called more than once" in r.reason for r in report.refusals)
    assert_untouched(model, before)


# --- reparameterized weights


class Reparameterized(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = wrap(nn.Linear(8, 12))
        self.norm = nn.BatchNorm1d(12)
        self.second = wrap(nn.Linear(12, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


WRAPS = [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm, old_weight_norm]


@pytest.mark.parametrize("wrap", WRAPS)
def test_parametrizations_and_hooks_go_away(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = randomized(lambda: Reparameterized(wrap), 1)
    x = torch.randn(4, 8) + 0.5
    before = model(x)
    report = normfuse.optimize_(model, (x,))
    assert report.verification
    assert not model.second._forward_pre_hooks and not hasattr(model.second, "parametrizations")
    assert type(model.second) is nn.Linear and type(model.norm) is nn.Identity
    assert sorted(model.state_dict()) == ["first.bias", "first.weight", "second.weight"]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


class StandardizedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(input, weight, self.bias)


def test_a_weight_that_the_code_computes_is_refused() -> None:
    model = randomized(lambda: nn.Sequential(StandardizedConv(3, 4, 3)), 1)
    report = normfuse.optimize_(model, (torch.randn(2, 3, 6, 6),))
    assert report.fired == {} and report.weights == {}
    assert any("its weight is computed by the module's own code" in r.reason for r in report.refusals)


# --- what no module can hold


class WrittenOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.layer_norm(x, (8,), self.gain))


class NoPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.ones(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(x), self.weight)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, args, output: output)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WrittenOut, "the norm is written out in the code of the model, not a module of its own"),
        (NoPlace, "linear needs a bias, which its module has no place for"),
        (hooked, "the module 0 has hooks, which a new module would lose"),
    ],
)
def test_refused(make: Callable[[], nn.Module], reason: str) -> None:
    model = randomized(make, 1)
    before = fingerprint(model)
    report = normfuse.optimize_(model, (torch.randn(3, 8) + 1,))
    assert report.fired == {}
    assert any("cannot be written back" in r.reason and reason in r.reason for r in report.refusals), report.refusals
    assert_untouched(model, before)


def test_only_modules_can_be_changed() -> None:
    exported = torch.export.export(nn.Linear(2, 2).eval(), (torch.randn(1, 2),))
    with pytest.raises(normfuse.CaptureError, match="optimize_ changes modules"):
        normfuse.optimize_(exported)  # type: ignore[arg-type]


# --- all or nothing


class ReadsItsNorm(nn.Module):
    """Python code that needs an attribute of the norm: it no longer runs once the norm has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))


def test_a_model_that_no_longer_runs_is_put_back_bit_for_bit() -> None:
    model, x = randomized(ReadsItsNorm, 1), torch.randn(3, 8) + 1
    before, output = fingerprint(model), model(x)
    with pytest.raises(normfuse.VerificationError, match="put back as they were: it no longer runs"):
        normfuse.optimize_(model, (x,))
    assert_untouched(model, before)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("off", [1 + 1e-6, 1 + 1e-2])
def test_a_mutant_is_caught_and_put_back(
    wrap: Callable[[nn.Module], nn.Module], off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = randomized(lambda: Reparameterized(wrap), 1), torch.randn(4, 8) + 0.5
    before, output = fingerprint(model), model(x)
    right = way._tensors
    monkeypatch.setattr(way, "_tensors", lambda *a: {n: (t.double() * off).to(t.dtype) for n, t in right(*a).items()})
    with pytest.raises(normfuse.VerificationError, match="put back as they were"):
        normfuse.optimize_(model, (x,))
    assert_untouched(model, before)
    assert torch.equal(model(x), output)


def test_again_changes_nothing() -> None:
    model = randomized(gpt2, 1)
    normfuse.optimize_(model, (), ids(), passes=["layer_norm_to_rms_norm", "fold_norm_affine"])
    before = fingerprint(model)
    report = normfuse.optimize_(model, (), ids(), passes=["layer_norm_to_rms_norm", "fold_norm_affine"])
    assert report.fired == {}
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = randomized(gpt2, 1).to(dtype)
    report = normfuse.optimize_(model, (), ids())
    assert report.verification and report.verification.error_ratio <= 2
    assert {p.dtype for p in model.parameters()} == {dtype}
