"""rotate_residual: the residual stream and the value heads in another basis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normfuse
from normfuse.algebra.calibration import observe
from normfuse.algebra.orthogonal import hadamard, hadamard_rotation, random_orthogonal
from normfuse.graph.node import aten, is_op
from normfuse.graph.program import Program
from normfuse.models import gpt, llama, neox, vit
from normfuse.models._random import randomized
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.passes import rotate_residual
from normfuse.rewrite import Rule

BEFORE = ["layer_norm_to_rms_norm", "fold_norm_affine"]


def rotated(module: Any, rule: str | Rule = "rotate_residual") -> normfuse.Optimized:
    args, kwargs = module.example("small")
    return normfuse.optimize(module.build("small"), args, kwargs, passes=[*BEFORE, rule])


# --- fires


@pytest.mark.parametrize("module", [llama, gpt, vit, neox])
def test_fires_once_a_stream_and_once_an_attention(module: Any) -> None:
    report = rotated(module).report
    assert report.fired["rotate_residual"] == 3
    assert [r.after for r in report.rewrites if r.pass_name == "rotate_residual"].count("rotated value heads") == 2


def test_either_alone() -> None:
    assert rotated(llama, rotate_residual.configured(heads=False)).report.fired["rotate_residual"] == 1
    assert rotated(llama, rotate_residual.configured(stream=False)).report.fired["rotate_residual"] == 2


def test_a_tied_head_stays_tied_where_both_uses_turn_alike() -> None:
    model = llama.build(llama.Config(tied=True))
    with torch.no_grad():
        model.norm.weight.fill_(1.0)  # type: ignore[union-attr, operator]
    report = normfuse.optimize_(model, llama.example("small")[0], passes=["fold_norm_affine", "rotate_residual"])
    assert report.fired["rotate_residual"] == 3


# --- refuses


class Tapped(nn.Module):
    """A pre-norm block; `tap` says what else happens to the stream."""

    def __init__(self, tap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(19, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.tap = tap

    def forward(self, ids: Tensor) -> Any:
        x = self.tokens(ids)
        x = x + self.mix(F.rms_norm(x, (16,), eps=1e-5))
        extra = self.tap(x)
        return self.head(F.rms_norm(x, (16,), eps=1e-5)), extra


@pytest.mark.parametrize(
    ("tap", "reason"),
    [
        (lambda x: x, "a tensor of the stream is an output of the model"),
        (lambda x: torch.tanh(x).sum(-1), "the stream is also read by tanh"),
        (lambda x: F.layer_norm(x, (16,)).sum(-1), "run layer_norm_to_rms_norm before"),
    ],
)
def test_refuses_a_stream_that_something_else_reads(tap: Callable[[Tensor], Any], reason: str) -> None:
    ids = torch.randint(0, 19, (2, 6))
    report = normfuse.optimize(randomized(lambda: Tapped(tap), 1), (ids,), passes=["rotate_residual"]).report
    assert report.fired == {}
    assert all(reason in r.reason for r in report.refusals) and report.refusals


@pytest.mark.parametrize(
    ("module", "reason"),
    [(gpt, "run layer_norm_to_rms_norm before"), (llama, "has a gain or other axes: run fold_norm_affine before")],
)
def test_refuses_before_its_forerunners(module: Any, reason: str) -> None:
    model, (args, _) = module.build("small"), module.example("small")
    report = normfuse.optimize(model, args, passes=["rotate_residual"]).report
    assert report.fired == {"rotate_residual": 2}  # the value heads need no forerunner
    assert any(reason in r.reason for r in report.refusals)


def test_refuses_a_matrix_that_does_not_fit() -> None:
    report = rotated(llama, rotate_residual.configured(matrix=random_orthogonal(32, 0), heads=False)).report
    assert any("the matrix is 32 wide, the stream 64" in r.reason for r in report.refusals)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fourier"}, "kind must be one of"),
        ({"kind": "klt"}, "needs calibration"),
        ({"matrix": torch.ones(4, 4)}, "not orthogonal"),
    ],
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate_residual.configured(**options)


def test_sizes_without_a_hadamard_matrix_are_refused() -> None:
    assert hadamard(66) is None
    config = llama.Config(dim=66, heads=3, kv_heads=3)
    report = normfuse.optimize(
        llama.build(config), llama.example(config)[0], passes=["fold_norm_affine", "rotate_residual"]
    ).report
    assert any("no Hadamard matrix of size 66 is known here: use kind='random'" in r.reason for r in report.refusals)


# --- same function


def calibration() -> list[Any]:
    return [llama.example("small", seed=seed)[0] for seed in (5, 6)]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "hadamard"},
        {"kind": "random", "seed": 3},
        {"matrix": random_orthogonal(64, 7)},
        {"kind": "klt", "calibration": calibration()},
        {"kind": "klt_hadamard", "calibration": calibration()},
    ],
)
def test_same_function(options: dict[str, Any]) -> None:
    verdict = rotated(llama, rotate_residual.configured(**options)).report.verification
    assert verdict and verdict.error_float64 < 1e-10 and verdict.error_ratio <= 2


@pytest.mark.parametrize("module", [gpt, vit, neox])
def test_same_function_of_centred_models(module: Any) -> None:
    verdict = rotated(module).report.verification
    assert verdict and verdict.error_float64 < 1e-10 and verdict.error_ratio <= 2


def test_a_stream_in_its_own_axes_is_uncorrelated() -> None:
    examples = calibration()
    plain, turned = (
        rotated(llama, "fold_norm_affine"),
        rotated(llama, rotate_residual.configured(kind="klt", calibration=examples, heads=False)),
    )
    assert _correlation(plain.program, examples) > 0.5
    assert _correlation(turned.program, examples) < 1e-4


def _correlation(program: Program, examples: list[Any]) -> float:
    rows = torch.cat([x.flatten(0, -2) for x in streams(program, examples)])
    moments = rows.T @ rows
    return float((moments - moments.diag().diag()).norm() / moments.norm())


def test_what_no_weight_can_take_is_turned_online() -> None:
    """Queries and keys behind RoPE (R3), and what the gate writes for the projection back (R4)."""
    rule = rotate_residual.configured(stream=False, heads=False, online=True)
    model, args = llama.build("small").double(), llama.example("small")[0]
    result = normfuse.optimize(model, args, passes=[rule])
    assert result.report.fired == {"rotate_residual": 4}
    assert sum(is_op(n, aten.matmul) for n in result.program.graph.nodes) == 2 * (2 + 1)
    assert result.report.verification and result.report.verification.error_float64 <= 1e-10
    again = normfuse.optimize(result, args, passes=[rule])
    assert not again.report.fired
    with torch.no_grad():  # the control: weights of the projection turned, what it reads as it was
        before = model(*args)
        for name, parameter in model.named_parameters():
            if name.endswith("down.weight"):
                parameter.copy_(parameter @ hadamard_rotation(parameter.shape[1], 0))
        assert float((model(*args) - before).abs().max() / before.abs().max()) >= 1e-1


def test_in_place() -> None:
    model = llama.build("small")
    report = normfuse.optimize_(model, llama.example("small")[0], passes=[*BEFORE, "rotate_residual"])
    assert report.fired["rotate_residual"] == 3 and report.verification


# --- a mutant fails


def test_an_almost_orthogonal_matrix_is_rolled_back() -> None:
    matrix = random_orthogonal(64, 1)
    rule = rotate_residual.configured(matrix=matrix, heads=False)
    matrix *= 1 + 1e-6
    matrix[0] *= 1 + 1e-6
    with pytest.raises(ValueError, match="not orthogonal"):
        rotate_residual.configured(matrix=matrix)
    report = rotated(llama, rule).report  # changed behind the check
    assert "rotate_residual" not in report.fired
    assert any("rolled back, the float64 error" in r.reason for r in report.refusals)


# --- idempotent


def test_nothing_left_of_a_pair_of_inverses() -> None:
    """Turned there and back: the weights are the original ones up to rounding."""
    matrix = random_orthogonal(64, 1)
    model = llama.build("small")
    args = llama.example("small")[0]
    normfuse.optimize_(model, args, passes=["fold_norm_affine"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for turn in (matrix, matrix.T.contiguous()):
        normfuse.optimize_(model, args, passes=[rotate_residual.configured(matrix=turn, heads=False)])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-6)


# --- what it is for


OUTLIERS = llama.Config(dim=256, heads=4, kv_heads=2, hidden=256)


def planted() -> nn.Module:
    """One channel of the stream a hundred times as large as the others."""
    model = llama.build(OUTLIERS)
    with torch.no_grad():
        model.tokens.weight[:, 7] *= 100  # type: ignore[union-attr, index]
    return model


def streams(program: Program, examples: list[Any]) -> Iterator[Tensor]:
    nodes = [n.args[0] for n in program.graph.nodes if is_op(n, RMS_NORM)]
    seen: list[Tensor] = []
    observe(program, nodes, examples, lambda node, got: seen.append(got), "streams")  # type: ignore[arg-type]
    yield from seen


def kurtosis(x: Tensor) -> float:
    return float((x**4).mean() / (x**2).mean() ** 2)


def fake_quantized_error(program: Program, examples: list[Any]) -> float:
    """Mean relative error of the linears with weights in int8 per output and inputs in int8 per token."""
    linears = [n for n in program.graph.nodes if is_op(n, aten.linear)]
    errors: list[float] = []

    def see(node: fx.Node, x: Tensor) -> None:
        for linear in linears:
            if linear.args[0] is node:
                weight = program.tensors[str(linear.args[1].target)].double()  # type: ignore[union-attr]
                exact, rounded = x @ weight.T, int8(x) @ int8(weight).T
                errors.append(float((rounded - exact).norm() / exact.norm()))

    observe(program, list(dict.fromkeys(n.args[0] for n in linears)), examples, see, "int8")  # type: ignore[arg-type]
    return sum(errors) / len(errors)


def int8(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def test_outliers_go_and_int8_errs_less() -> None:
    args = llama.example(OUTLIERS)[0]
    plain = normfuse.optimize(planted(), args, passes=BEFORE)
    turned = normfuse.optimize(planted(), args, passes=[*BEFORE, "rotate_residual"])
    assert turned.report.verification
    before = [kurtosis(x) for x in streams(plain.program, [args])]
    after = [kurtosis(x) for x in streams(turned.program, [args])]
    assert min(before) > 100 and max(after) < 4
    assert fake_quantized_error(plain.program, [args]) > 2 * fake_quantized_error(turned.program, [args])
