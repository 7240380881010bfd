"""METHODS' table, lines on gains, centring and narrower streams that no test of the passes holds (test_methods_table)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normfuse
from normfuse.graph.node import aten, is_op
from normfuse.models import bert, convnext, gpt, llama, vit
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.passes import layer_norm_to_rms_norm, migrate_scales, rms_norm_to_crms_norm, rotate_residual
from tests.passes.test_migrate_scales import ReluNet, lognormal, relu_inputs
from tests.support import assert_same_function, ids, image, operators, optimized, randomised, reasons
from tests.zoo.entry import randomise, seeded

CENTRE = "layer_norm_to_rms_norm"


def worst(candidate: Tensor, reference: Tensor) -> float:
    return float((candidate - reference).detach().abs().max() / reference.detach().abs().max())


# -- LN/RMSNorm affine absorption


def test_four_block_gpt_keeps_no_gain_and_no_shift() -> None:
    config = gpt.Config(layers=4, tied=False)
    args, kwargs = gpt.example(config)
    result = normfuse.optimize(gpt.build(config), args, kwargs, passes=["fold_norm_affine"])
    assert_same_function(result)
    assert result.report.fired == {"fold_norm_affine": 9}  # qkv and fc1 of four blocks, and the head
    norms = [n for n in result.program.graph.nodes if is_op(n, aten.layer_norm)]
    assert len(norms) == 9 and all(n.args[2] is None and n.args[3] is None for n in norms)


def test_a_gemma_norm_holds_no_w_after_folding_in_place() -> None:
    """METHODS wants w == 0, a gain of one: here the module that added one to it is gone."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = randomised(GemmaForCausalLM(config))
    report = normfuse.optimize_(model, (ids(2, 7),), passes=["fold_norm_affine"])
    assert report.fired == {"fold_norm_affine": 5} and report.verification
    assert report.verification.error_float64 <= 1e-10
    assert not [name for name, _ in model.named_parameters() if "norm" in name]


# -- Pre-LN to Pre-RMSNorm


def stream_means(result: normfuse.Optimized, args: Any) -> list[float]:
    """|mean| over rms, the largest of each tensor that a norm reads, run in the program's own dtype."""
    found: list[float] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and getattr(n.target, "_opname", "") in ("rms_norm", "layer_norm"):
                x = self.env[n.args[0]]  # type: ignore[index]
                found.append(float((x.mean(-1).abs() / x.square().mean(-1).sqrt()).max()))
            return super().run_node(n)

    with torch.no_grad():
        Watch(result.graph_module, garbage_collect_values=False).run(*args)
    return found


def shifted(model: nn.Module) -> nn.Module:
    """What writes the stream first is moved by 3: the mean that goes away is not small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("tokens.weight", "wte.weight", "pos_embed", "positions", "positions.weight")):
                parameter.add_(3)
    return model


@pytest.mark.parametrize("module", [gpt, vit])
def test_every_tensor_of_the_stream_has_zero_mean(module: Any) -> None:
    args, kwargs = module.example("small")
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    model = shifted(module.build("small")).double()
    if module is vit:  # its norms compute in float32 whatever the model's dtype
        for name, norm in list(model.named_modules()):
            if isinstance(norm, nn.LayerNorm):
                plain = nn.LayerNorm(norm.normalized_shape, norm.eps).double()
                plain.load_state_dict(norm.state_dict())
                model.set_submodule(name, plain)
    result = normfuse.optimize(model.eval(), args, kwargs, passes=[CENTRE])
    assert_same_function(result)
    means = stream_means(result, args)
    assert len(means) == 5 and "layer_norm" not in operators(result)
    assert max(means) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit_tiny_patch16_224"])
def test_gpt2_small_and_vit_tiny_keep_no_layer_norm(name: str) -> None:
    with seeded(name):
        if name == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            model, args = GPT2LMHeadModel(GPT2Config(use_cache=False)), (ids(1, 16, vocabulary=50257),)
        else:
            from tests.zoo.torchvision_stub import import_timm

            model, args = import_timm().create_model(name), (image(1, 3, 224, 224),)
        model = shifted(randomise(model.eval(), (args, {})))
    result = normfuse.optimize(model, args, passes=[CENTRE])
    assert_same_function(result)
    assert "layer_norm" not in operators(result)
    with torch.no_grad():
        given, got = model(*args), result(*args)
    assert worst(*(t if isinstance(t, Tensor) else t["logits"] for t in (got, given))) <= 2e-5


# -- the refusal set


class Peri(nn.Module):
    """A norm before each branch, and one behind it whose gain writes the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.last, self.head = nn.Embedding(50, 12), nn.LayerNorm(12), nn.Linear(12, 5)
        self.inside, self.outside = (nn.ModuleList(nn.LayerNorm(12) for _ in range(2)) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        for inside, mix, outside in zip(self.inside, self.mix, self.outside, strict=True):
            h = h + outside(torch.tanh(mix(inside(h))))
        return self.head(self.last(h))


class Tapped(nn.Module):
    """DINO: the tokens of a layer in between are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit.build("small")

    def forward(self, x: Tensor) -> Any:
        seen: list[Tensor] = []
        hook = self.vit.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out))  # type: ignore[index, union-attr]
        y = self.vit(x)
        hook.remove()
        return y, seen[0]


Example = tuple[tuple[Any, ...], dict[str, Any]]
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Example], str]] = {
    "convnext": (lambda: convnext.build("small"), lambda: convnext.example("small"), "depthwise or grouped convolution"),
    "bert": (lambda: bert.build("small"), lambda: bert.example("small"), "post-LN: the stream is written by the gain"),
    "peri-ln": (lambda: randomised(Peri()), lambda: ((ids(2, 7),), {}), "layer_norm at outside.0"),
    "dino": (lambda: Tapped().eval(), lambda: vit.example("small"), "a tensor of the stream is an output of the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_streams_whose_mean_is_seen_are_not_centred(name: str) -> None:
    make, example, reason = REFUSED[name]
    result = normfuse.optimize(make(), *example())
    assert_same_function(result)
    assert any(reason in r for r in reasons(result, CENTRE)), reasons(result, CENTRE)


def test_llama_is_not_applicable_and_its_embedding_is_bit_identical() -> None:
    model, args = llama.build("small"), llama.example("small")[0]
    before = copy.deepcopy(model.state_dict())
    report = normfuse.optimize_(model, args, passes=[CENTRE])
    assert report.fired == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -- post-LN


class PostNorm(nn.Module):
    """Two layers, with a norm behind the embedding as BERT has it."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 12), nn.Linear(12, 5)
        self.norms = nn.ModuleList(norm(12) for _ in range(3))
        self.up, self.down = (nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((12, 24), (24, 12)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.tokens(x))
        for norm, up, down in zip(self.norms[1:], self.up, self.down, strict=True):  # type: ignore[arg-type]
            h = norm(h + down(torch.tanh(up(h))))
        return self.head(h)


def post_norm(*, gain: float | None) -> PostNorm:
    model = randomised(PostNorm())
    if gain is not None:
        for norm in model.norms:
            nn.init.constant_(norm.weight, gain)  # type: ignore[arg-type]
    return model  # type: ignore[return-value]


def test_post_norm_with_one_number_for_a_gain_is_centred() -> None:
    model = post_norm(gain=1.7)
    result = optimized(model, ids(2, 7), passes=[CENTRE])
    assert result.report.fired == {CENTRE: 3} and "layer_norm" not in operators(result)
    assert result.report.verification and result.report.verification.error_float64 <= 1e-12
    assert CENTRE in optimized(model, ids(2, 7)).report.fired  # unasked, the embedding's norm alone
    assert optimized(model, ids(2, 7)).report.fired[CENTRE] == 1


def test_post_norm_with_one_number_for_a_gain_is_centred_in_place() -> None:
    model, x = post_norm(gain=1.7), ids(2, 7)
    before = model(x)
    report = normfuse.optimize_(model, (x,), passes=[CENTRE])
    assert report.fired == {CENTRE: 3} and report.verification
    assert {type(norm).__name__ for norm in model.norms} == {"RMSNorm"} and worst(model(x), before) <= 1e-5


def test_that_a_gain_is_one_number_in_this_checkpoint_is_not_replayed_silently() -> None:
    model = post_norm(gain=1.7)
    ledger = optimized(model, ids(2, 7), passes=[CENTRE]).report.weights
    with pytest.raises(normfuse.NormfuseError, match="has no value in this checkpoint"):
        normfuse.replay(ledger, post_norm(gain=None).state_dict())


def test_post_norm_with_a_gain_of_many_numbers_is_refused() -> None:
    result = optimized(post_norm(gain=None), ids(2, 7), passes=[CENTRE])
    assert result.report.fired == {CENTRE: 1}  # behind the embedding
    assert sum("post-LN" in reason for reason in reasons(result, CENTRE)) == 2


class RMS(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps) + self.bias


@torch.no_grad()
def forced(model: PostNorm) -> nn.Module:
    """The rewrite by hand: branches and shifts centred, W 1 mean(shift) in the bias of who reads them."""
    other = PostNorm(RMS).double().eval()
    other.load_state_dict(model.state_dict())
    weights = [other.tokens.weight.T, *(p for down in other.down for p in (down.weight, down.bias))]  # type: ignore[union-attr]
    for weight in weights:
        weight -= weight.mean(0)  # type: ignore[operator]
    for norm, reader in zip(other.norms, [*other.up, other.head], strict=True):
        reader.bias += reader.weight.sum(1) * norm.bias.mean()  # type: ignore[operator, union-attr]
        norm.bias -= norm.bias.mean()  # type: ignore[operator, union-attr]
    return other


def test_the_forced_rewrite_is_exact_for_one_number_alone() -> None:
    even, uneven, x = post_norm(gain=1.7).double(), post_norm(gain=None).double(), ids(2, 7)
    assert worst(forced(even)(x), even(x)) <= 1e-12  # type: ignore[arg-type]
    assert worst(forced(uneven)(x), uneven(x)) >= 1e-2  # type: ignore[arg-type]


# -- tied heads


def test_a_tied_head_may_stay_tied_or_part() -> None:
    """Shared: one table, one correction of rank one. Parted: V d parameters more."""
    args, kwargs = gpt.example("small")
    model = gpt.build("small").double()
    before, (rows, width) = sum(p.numel() for p in model.parameters()), (gpt.CONFIGS["small"].vocab, 64)
    for tied, more in (("copy", rows * width), ("shared", rows)):
        rule = layer_norm_to_rms_norm.configured(tied=tied)
        result = normfuse.optimize(model, args, kwargs, passes=[rule])
        assert result.report.fired == {CENTRE: 5} and result.report.verification
        assert result.report.verification.error_float64 <= 1e-12
        assert sum(t.numel() for t in result.tensors().values()) == before + more
        assert sum(t.shape == (rows, width) for t in result.tensors().values()) == (2 if tied == "copy" else 1)
    with pytest.raises(ValueError, match="tied must be one of shared, copy"):
        layer_norm_to_rms_norm.configured(tied="loose")


def test_in_place_a_table_is_not_shared_by_a_sum_that_the_code_does_not_make() -> None:
    model, args = gpt.build("small"), gpt.example("small")[0]
    report = normfuse.optimize_(model, args, passes=[layer_norm_to_rms_norm.configured(tied="shared")])
    assert report.fired == {} and model.head.weight is model.tokens.weight  # type: ignore[union-attr]
    assert any("linear becomes add, which the module's own code does not do" in r.reason for r in report.refusals)


# -- scales


def test_lognormal_scales_through_relu() -> None:
    """OPT's MLP, with the scales that the table asks for."""
    scales = {"fc1": lognormal(20), "a": lognormal(8, 1)}
    model, inputs = randomised(ReluNet()), relu_inputs()
    result = optimized(model, *inputs, passes=[migrate_scales.configured(scales=scales)])
    assert result.report.fired == {"migrate_scales": 2}


# -- SliceGPT


def test_a_stream_in_its_principal_axes_and_one_channel_less() -> None:
    """No slicing: the basis alone. Centring leaves one direction empty: without it nothing is lost."""
    args, kwargs = gpt.example("small")
    turn = rotate_residual.configured(kind="klt", calibration=[(args, kwargs)], heads=False)
    before = [CENTRE, "fold_norm_affine"]
    for narrower, limit in (([], 1e-9), ([rms_norm_to_crms_norm.configured(form="householder")], 1e-8)):
        result = normfuse.optimize(gpt.build("small"), args, kwargs, passes=[*before, *narrower, turn])
        assert result.report.fired["rotate_residual"] == 1 and result.report.verification
        assert result.report.verification.error_float64 <= limit
        norms = [n for n in result.program.graph.nodes if is_op(n, RMS_NORM)]
        assert {int(n.meta["val"].shape[-1]) for n in norms} == {63 if narrower else 64}
