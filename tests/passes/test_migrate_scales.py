"""migrate_scales: factors per channel between a writer and its readers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.algebra import scales
from normfuse.graph.node import aten, is_op
from normfuse.models import gpt, llama, vit
from normfuse.models._random import randomized
from normfuse.passes import migrate_scales
from normfuse.rewrite import Rule

GROUPED = llama.Config(dim=64, heads=8, kv_heads=2)


def lognormal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp()


def migrated(module: Any, rule: str | Rule = "migrate_scales", config: Any = "small") -> normfuse.Optimized:
    args, kwargs = module.example(config)
    return normfuse.optimize(module.build(config), args, kwargs, passes=[rule])


def reasons(optimized: normfuse.Optimized) -> str:
    return "\n".join(r.reason for r in optimized.report.refusals)


class ReluNet(nn.Module):
    """OPT's MLP, then convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc2(F.relu(self.fc1(x))), self.b(F.leaky_relu(self.a(image), 0.1))


def relu_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 12) + 0.5, torch.randn(2, 3, 6, 6) + 0.5


# --- fires


def test_pairs_of_a_llama() -> None:
    report = migrated(llama).report
    after = [r.after for r in report.rewrites]
    assert report.fired == {"migrate_scales": 9}
    assert after.count("rms_norm, scales in blocks.0.mlp.gate, blocks.0.mlp.up") == 1
    assert after.count("linear, scales in blocks.1.attention.out") == 1
    assert after.count("linear, scales in blocks.1.mlp.down") == 1


@pytest.mark.parametrize("module", [gpt, vit])
def test_values_inside_a_fused_projection(module: Any) -> None:
    report = migrated(module).report
    assert report.fired == {"migrate_scales": 7}
    assert any(r.after == "linear, scales in blocks.0.attention.out" for r in report.rewrites)


def test_through_relu() -> None:
    result = normfuse.optimize(randomized(ReluNet, 1), relu_inputs(), passes=["migrate_scales"])
    assert result.report.fired == {"migrate_scales": 2}
    assert result.report.verification


# --- refuses


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (gpt, "blocks.0.mlp.up", "gelu at blocks.0.mlp"),
        (llama, "blocks.0.mlp.gate", "silu at blocks.0.mlp"),
        (llama, "blocks.0.attention.q", "channels that RoPE turns together, or that meet the same key, have different"),
        (llama, "blocks.0.mlp.down", "add at blocks.0"),
        (llama, "nowhere", "nowhere writes no channels that a scale can be moved across"),
    ],
)
def test_refuses_what_does_not_commute(module: Any, name: str, reason: str) -> None:
    rule = migrate_scales.configured(scales={name: lognormal(64)})
    result = migrated(module, rule)
    assert result.report.fired == {}
    assert reason in reasons(result)


def test_refuses_different_scales_for_copies_of_a_head() -> None:
    rule = migrate_scales.configured(scales={"blocks.0.attention.v": lognormal(64)})
    result = migrated(llama, rule, GROUPED)
    assert result.report.fired == {}
    assert "the scales of the copies differ" in reasons(result)


@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [("blocks.0.mlp.up", 3, "writes 160 channels, and 3 scales were given"),
     ("blocks.0.attention.v", 3, "writes 32 channels, and 3 scales were given")],
)  # fmt: skip
def test_refuses_a_wrong_number_of_scales(name: str, length: int, reason: str) -> None:
    assert reason in reasons(migrated(llama, migrate_scales.configured(scales={name: lognormal(length)})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "method must be one of"),
        ({"method": "awq"}, "needs calibration"),
        ({"scales": {"a": torch.tensor([1.0, 0.0])}}, "vector of positive numbers"),
        ({"scales": {"a": torch.tensor([1.0, float("nan")])}}, "vector of positive numbers"),
    ],
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        migrate_scales.configured(**options)


# --- same function


def test_given_scales_on_grouped_heads_gate_and_norm() -> None:
    copies = lognormal(16, 3).reshape(2, 1, 8).expand(2, 4, 8).reshape(64)
    given = {
        "blocks.0.norm1": lognormal(64), "blocks.0.attention.v": lognormal(16, 1), "blocks.1.attention.v": copies,
        "blocks.0.mlp.up": lognormal(160, 2), "blocks.1.mlp.up": lognormal(160, 4),
    }  # fmt: skip
    report = migrated(llama, migrate_scales.configured(scales=given), GROUPED).report
    assert report.fired == {"migrate_scales": 5} and report.refusals == []
    assert report.verification and report.verification.error_float64 < 1e-10


@pytest.mark.parametrize("module", [llama, gpt, vit])
@pytest.mark.parametrize("method", ["weights", "smoothquant", "awq"])
def test_same_function(module: Any, method: str) -> None:
    args, kwargs = module.example("small", seed=5)
    rule = (
        migrate_scales.RULE
        if method == "weights"
        else migrate_scales.configured(method=method, calibration=[(args, kwargs)], alpha=0.7)
    )
    verdict = migrated(module, rule).report.verification
    assert verdict and verdict.error_float64 < 1e-10 and verdict.error_ratio <= 2


def test_behind_a_norm_without_gain() -> None:
    args, _ = llama.example("small")
    result = normfuse.optimize(llama.build("small"), args, passes=["fold_norm_affine", "rotate_residual", "migrate_scales"])
    assert result.report.fired["migrate_scales"] == 9 and result.report.verification


def test_in_place_on_a_relu_model() -> None:
    model, inputs = randomized(ReluNet, 1), relu_inputs()
    report = normfuse.optimize_(model, inputs, passes=["migrate_scales"])
    assert report.fired == {"migrate_scales": 2}
    assert set(report.weights) == {"fc1.weight", "fc1.bias", "fc2.weight", "a.weight", "a.bias", "b.weight"}


def test_lognormal_scales_through_relu() -> None:
    rule = migrate_scales.configured(scales={"fc1": lognormal(20), "a": lognormal(8, 1)})
    report = normfuse.optimize(randomized(ReluNet, 1), relu_inputs(), passes=[rule]).report
    assert report.fired == {"migrate_scales": 2}
    assert report.verification and report.verification.error_float64 < 1e-10


# --- queries and keys (OSTQuant)


def paired(heads: int, width: int, seed: int = 0) -> Tensor:
    """One scale for channels i and i + width / 2 of a head."""
    return lognormal(heads * width // 2, seed).reshape(heads, 1, -1).expand(heads, 2, width // 2).reshape(-1)


def scaled(model: nn.Module, args: tuple[Any, ...], given: dict[str, Tensor], **options: Any) -> normfuse.Optimized:
    return normfuse.optimize(model, args, passes=[migrate_scales.configured(scales=given, **options)])


def test_pairs_of_rope_take_one_scale_each_on_grouped_heads() -> None:
    queries = paired(2, 8, 1).reshape(2, 1, 8).expand(2, 4, 8).reshape(64)
    given = {"blocks.0.attention.k": paired(2, 8), "blocks.1.attention.q": queries}
    args, _ = llama.example(GROUPED)
    report = scaled(llama.build(GROUPED), args, given).report
    assert report.fired == {"migrate_scales": 2} and report.refusals == []
    assert report.verification and report.verification.error_float64 <= 1e-12


def test_gains_of_query_and_key_norms_take_them_too() -> None:
    args, _ = llama.example("small-qwen")
    model = llama.build("small-qwen")
    report = scaled(model, args, {"blocks.0.attention.q_norm": paired(1, 16)}).report
    assert report.fired == {"migrate_scales": 1}
    assert report.verification and report.verification.error_float64 <= 1e-12


class Scores(nn.Module):
    """Queries and keys from two projections: without positions, or turned in neighbours as GPT-J does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
        a, b = x[..., ::2], x[..., 1::2]
        pair = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(pair, -1).flatten(-2) if self.kind == "neighbours" else x

    def forward(self, x: Tensor) -> Any:
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2)
        return (y, k.tanh()) if self.kind == "tapped" else y


def score_inputs() -> tuple[Tensor]:
    return (torch.randn(2, 5, 24) + 0.3,)


@pytest.mark.parametrize(("kind", "scale"), [("plain", lognormal(24)), ("neighbours", lognormal(12).repeat_interleave(2))])
def test_queries_against_keys(kind: str, scale: Tensor) -> None:
    model = randomized(lambda: Scores(kind), 1)
    report = normfuse.optimize_(model, score_inputs(), passes=[migrate_scales.configured(scales={"q": scale})])
    assert report.fired == {"migrate_scales": 1}
    assert report.verification and report.verification.error_float64 <= 1e-12
    assert set(report.weights) == {"q.weight", "q.bias", "k.weight", "k.bias"}
    assert report.rewrites[0].after == "queries, keys, scales in q, k"


@pytest.mark.parametrize(
    ("kind", "length", "reason"),
    [
        ("neighbours", 24, "channels that RoPE turns together, or that meet the same key, have different scales"),
        ("plain", 3, "it writes 24 channels, and 3 scales were given"),
        ("tapped", 24, "its key is also read by tanh"),
    ],
)
def test_refuses_queries_against_keys(kind: str, length: int, reason: str) -> None:
    result = scaled(randomized(lambda: Scores(kind), 1), score_inputs(), {"q": lognormal(length)})
    assert result.report.fired == {}
    assert reason in reasons(result)


def test_unpaired_scales_would_change_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: forced through, they are off by far more than any rounding."""
    monkeypatch.setattr(migrate_scales, "score_scale", lambda own, other, scale: 1 / scale)
    result = scaled(randomized(lambda: Scores("neighbours"), 1), score_inputs(), {"q": lognormal(24) ** 2})
    assert result.report.fired == {}
    [why] = [r.reason for r in result.report.refusals]
    assert float(why.removeprefix("rolled back, the float64 error ").split()[0]) >= 1e-1


# --- Mamba: the gate's SiLU, and the depthwise convolution


class Mamba(nn.Module):
    """A selective state space block, with a bias wherever there can be one (arXiv 2312.00752, figure 3)."""

    def __init__(self, width: int = 8, inner: int = 12, states: int = 3, rank: int = 4) -> None:
        super().__init__()
        self.sizes = (rank, states, states)
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.conv1d = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, sum(self.sizes)), nn.Linear(rank, inner)
        self.a_log, self.d = nn.Parameter(torch.zeros(inner, states)), nn.Parameter(torch.zeros(inner))

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, -1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(x).split(self.sizes, -1)
        dt = F.softplus(self.dt_proj(dt)).unsqueeze(-1)
        decay, drive = (-dt * self.a_log.exp()).exp(), dt * x.unsqueeze(-1) * b.unsqueeze(2)
        state, rows = torch.zeros_like(drive[:, 0]), []
        for t in range(u.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            rows.append((state * c[:, t, None]).sum(-1))
        return self.out_proj((torch.stack(rows, 1) + self.d * x) * F.silu(z))


def mamba() -> tuple[nn.Module, tuple[Tensor]]:
    return randomized(Mamba, 1).double(), (torch.randn(2, 6, 8).double() + 0.3,)


def mamba_scaled(**options: Any) -> normfuse.Optimized:
    model, args = mamba()
    rule = migrate_scales.configured(scales={"in_proj": lognormal(24)}, **options)
    return normfuse.optimize(model, args, passes=[rule], dynamic_shapes=None)


@pytest.mark.parametrize("silu", [False, True])
def test_mamba_takes_scales_at_the_convolution_and_at_the_gate(silu: bool) -> None:
    result = mamba_scaled(silu=silu)
    readers = "conv1d, out_proj" if silu else "conv1d"
    assert [r.after for r in result.report.rewrites] == [f"linear, scales in {readers}"]
    changed = {name.removesuffix("_baked") for name in result.report.weights}
    gate = {"out_proj.weight"} if silu else set()
    assert {"in_proj.weight", "in_proj.bias", "conv1d.weight"} | gate <= changed
    assert "conv1d.bias" not in changed
    assert reasons(result) == ("" if silu else "12 channels of in_proj take no scale: what reads them does not pass it on")
    assert result.report.verification and result.report.verification.error_float64 <= 1e-12


@pytest.mark.parametrize("method", ["weights", "smoothquant", "awq"])
def test_mamba_with_scales_of_its_own(method: str) -> None:
    model, args = mamba()
    options: dict[str, Any] = {} if method == "weights" else {"method": method, "calibration": [args]}
    rule = migrate_scales.configured(silu=True, **options)
    report = normfuse.optimize(model, args, passes=[rule], dynamic_shapes=None).report
    assert report.fired == {"migrate_scales": 2}
    assert report.verification and report.verification.error_float64 <= 1e-12


def test_the_bias_in_front_of_the_convolution_is_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with the bias as it was, the result is another one."""
    right = scales._divided

    def forgetful(edit: Any, pair: Any, node: Any, scale: Any) -> dict[str, Any]:
        return {name: new for name, new in right(edit, pair, node, scale).items() if name != "bias"}

    monkeypatch.setattr(scales, "_divided", forgetful)
    assert "rolled back, the float64 error" in reasons(mamba_scaled())


def test_silu_is_refused_unless_asked_for() -> None:
    args, _ = llama.example("small")
    given = {"blocks.0.mlp.gate": lognormal(160)}
    assert scaled(llama.build("small"), args, given).report.fired == {}
    report = scaled(llama.build("small"), args, given, silu=True).report
    assert report.fired == {"migrate_scales": 1}
    assert report.verification and report.verification.error_float64 <= 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions_read_scales(groups: int) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=groups))
    model, image = randomized(lambda: layers, 1), torch.randn(2, 3, 5, 5) + 0.4
    for rule in (migrate_scales.RULE, migrate_scales.configured(method="awq", calibration=[image])):
        report = normfuse.optimize(model, (image,), passes=[rule]).report
        assert report.fired == {"migrate_scales": 1}
        assert report.verification and report.verification.error_float64 < 1e-12


# --- a mutant fails


def test_a_scale_that_is_not_taken_back_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scales._divided
    monkeypatch.setattr(scales, "_divided", lambda edit, pair, node, scale: right(edit, pair, node, scale * (1 + 1e-6)))
    result = normfuse.optimize(randomized(ReluNet, 1), relu_inputs(), passes=["migrate_scales"])
    assert result.report.fired == {}
    assert "rolled back, the float64 error" in reasons(result)


# --- idempotent


def test_balanced_weights_stay_as_they_are() -> None:
    """max|W1| = max|W2| after it: the second time every scale is one."""
    model, inputs = randomized(ReluNet, 1), relu_inputs()
    normfuse.optimize_(model, inputs, passes=["migrate_scales"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    normfuse.optimize_(model, inputs, passes=["migrate_scales"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-6)


# --- what it is for


def test_w8a8_errs_less_on_an_outlier() -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48))
    randomized(lambda: model, 1)
    with torch.no_grad():
        model[0].weight[5] *= 50
    x = torch.randn(64, 32)
    rule = migrate_scales.configured(calibration=[x])
    plain, smooth = (normfuse.optimize(model, (x,), passes=passes) for passes in ([], [rule]))
    assert error_w8a8(plain, x) > 2 * error_w8a8(smooth, x)


def error_w8a8(optimized: normfuse.Optimized, x: Tensor) -> float:
    """Mean square error of the linear with 8 bits, one step for the input, one for the weight."""
    program = optimized.program
    [linear] = [n for n in program.graph.nodes if is_op(n, aten.linear)]
    weight = program.tensors[str(linear.args[1].target)].double()
    seen: list[Tensor] = []
    from normfuse.algebra.calibration import observe

    observe(program, [linear.args[0]], [x], lambda node, got: seen.append(got), "w8a8")
    whole = [scales.fake_quantized(t.reshape(1, -1), 8).reshape(t.shape) for t in (seen[0], weight)]
    return float((whole[0] @ whole[1].T - seen[0] @ weight.T).square().mean())
