"""migrate_scales: factors per channel between a writer and its readers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.models import gpt, llama, vit
from normfuse.models._random import randomized
from normfuse.node import aten, is_op
from normfuse.passes import migrate_scales
from normfuse.rewrite import Rule, scales

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
        (llama, "blocks.0.attention.q", "cat at blocks.0.attention"),
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
    from normfuse.rewrite.calibration import observe

    observe(program, [linear.args[0]], [x], lambda node, got: seen.append(got), "w8a8")
    whole = [scales.fake_quantized(t.reshape(1, -1), 8).reshape(t.shape) for t in (seen[0], weight)]
    return float((whole[0] @ whole[1].T - seen[0] @ weight.T).square().mean())
