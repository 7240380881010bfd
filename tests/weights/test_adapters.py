"""Adapters trained before a rewrite: carried over it they do to the new model what they did to the old one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.models import convnext, gpt, llama, swin
from normfuse.models._random import randomized
from normfuse.passes import rotate_residual

EXACT = 1e-10
STREAM = ["layer_norm_to_rms_norm", "fold_norm_affine"]


def adapter(weight: Tensor, seed: int, rank: int = 3) -> normfuse.Adapter:
    noise = torch.Generator().manual_seed(seed)
    b = torch.randn(weight.shape[0], rank, generator=noise, dtype=torch.float64) * 0.3
    return normfuse.Adapter(torch.randn(rank, *weight.shape[1:], generator=noise, dtype=torch.float64) * 0.3, b)


def adapters_of(model: nn.Module) -> dict[str, normfuse.Adapter]:
    """One for each matrix that is trained by LoRA: projections, convolutions of one group, tables; a tied one once."""
    kinds = (nn.Linear, nn.Embedding)
    named = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds) or getattr(m, "groups", 0) == 1}
    return {name: adapter(p, seed) for seed, (name, p) in enumerate(model.named_parameters()) if name in named}


def with_adapters(tensors: dict[str, Tensor], carried: dict[str, Any]) -> dict[str, Tensor]:
    deltas = {name: c.delta if isinstance(c, normfuse.Adapter) else c for name, c in carried.items()}
    return {name: t + deltas[name] if name in deltas else t for name, t in tensors.items()}


def rank(delta: Tensor) -> int:
    return int(torch.linalg.matrix_rank(delta.flatten(1)))


def assert_carried(build: Any, example: tuple[Any, Any], **options: Any) -> Any:
    """optimize(base) with carried adapters is what optimize(base with adapters) is, each parameter of it."""
    base, (args, kwargs) = build().double(), example
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    adapters = adapters_of(base)
    state = base.state_dict()
    result = normfuse.optimize(base, args, kwargs, **options)
    carried = normfuse.carry_adapters(result.report.weights, state, adapters)
    adapted = build().double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(adapters[name].delta if name in adapters else 0)
    wanted = normfuse.optimize(adapted, args, kwargs, **options).tensors()
    got = with_adapters(result.tensors(), carried)
    assert got.keys() == wanted.keys() and set(carried) & set(result.report.weights)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=EXACT * float(wanted[name].abs().max()))
    return carried, result, adapted, args


CASES = {
    "gpt": (gpt, {"passes": STREAM}),
    "gpt, everything": (gpt, {}),
    "llama, everything": (llama, {}),
    "llama, rotated": (llama, {"passes": ["fold_norm_affine", "rotate_residual"]}),
    "gpt, rotated": (gpt, {"passes": [*STREAM, rotate_residual.configured(kind="random")]}),
    "gpt, one dimension less": (gpt, {"passes": [*STREAM, "rms_norm_to_crms_norm"]}),
    "gpt, value bias": (gpt, {"passes": [*STREAM, "fold_value_bias"]}),
    "llama, merged": (llama, {"passes": ["fold_norm_affine", "merge_linears"]}),
    "swin": (swin, {"passes": [*STREAM, "fold_layer_scale"]}),
    "convnext": (convnext, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_carried_over(case: str) -> None:
    module, options = CASES[case]
    carried, _, _, _ = assert_carried(lambda: module.build("small"), module.example("small"), **options)
    low = [c for c in carried.values() if isinstance(c, normfuse.Adapter)]
    assert all(c.b.dtype == torch.float64 for c in low)


def test_the_rank_stays_and_the_function_is_that_of_the_adapted_model() -> None:
    carried, result, adapted, args = assert_carried(lambda: gpt.build("small"), gpt.example("small"))
    for name in result.report.weights:
        if isinstance(carried.get(name), normfuse.Adapter):
            delta = carried[name].delta  # of the means of a table's rows, one column
            assert carried[name].a.shape[0] == 3 and rank(delta) == min(3, *delta.shape)
    merged = normfuse.optimize(gpt.build("small").double(), args)
    with torch.no_grad():
        for name, tensor in list(merged.tensors().items()):
            tensor.copy_(with_adapters({name: tensor}, carried)[name])
        got, wanted = merged(*args), adapted(*args)
    assert (got - wanted).norm() / wanted.norm() <= EXACT


def test_into_the_users_own_modules() -> None:
    base, adapted, (args, _) = gpt.build("small").double(), gpt.build("small").double(), gpt.example("small")
    adapters, state = adapters_of(base), {name: t.clone() for name, t in base.state_dict().items()}
    report = normfuse.optimize_(base, args, passes=STREAM)
    assert report.fired
    carried = normfuse.carry_adapters(report.weights, state, adapters)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(with_adapters({name: parameter}, carried)[name])
        for name, parameter in adapted.named_parameters():
            parameter.add_(adapters[name].delta if name in adapters else 0)
        got, wanted = base(*args), adapted(*args)
    assert (got - wanted).norm() / wanted.norm() <= EXACT


def test_projections_beside_each_other_get_their_ranks_together() -> None:
    model, x = randomized(lambda: Beside(), 1).double(), torch.randn(2, 6).double()
    adapters = {f"{name}.weight": adapter(getattr(model, name).weight, seed) for seed, name in enumerate("ab")}
    result = normfuse.optimize(model, (x,), passes=["merge_linears"])
    assert result.report.fired == {"merge_linears": 1}
    carried = normfuse.carry_adapters(result.report.weights, model.state_dict(), adapters)
    [merged] = [carried[name] for name, w in result.report.weights.items() if w.node.meta["val"].dim() == 2]
    assert isinstance(merged, normfuse.Adapter) and merged.b.shape[-1] == 6
    wanted = torch.cat([adapters["a.weight"].delta, adapters["b.weight"].delta])
    torch.testing.assert_close(merged.delta, wanted)


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x).tanh()


def test_convolutions_behind_a_batch_norm() -> None:

    def layers() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    assert_carried(lambda: randomized(layers, 1), ((torch.randn(2, 3, 6, 6),), None))


# --- refuses


def test_refuses_what_is_no_linear_function() -> None:
    model = randomized(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), 1).double()
    name = "parametrizations.weight.original1"
    report = normfuse.optimize(model, (torch.randn(2, 6).double(),), passes=["bake_weights"]).report
    with pytest.raises(normfuse.NormfuseError, match=f"is no linear function of {name}: .* of it"):
        normfuse.carry_adapters(report.weights, model.state_dict(), {name: adapter(torch.empty(4, 6), 1)})


def test_refuses_singular_vectors() -> None:
    model = gpt.build("small").double()
    report = normfuse.optimize(model, *gpt.example("small"), passes=["clover"]).report
    name = "blocks.0.attention.qkv.weight"
    with pytest.raises(normfuse.NormfuseError, match="is no linear function"):
        normfuse.carry_adapters(report.weights, model.state_dict(), {name: adapter(model.state_dict()[name], 1)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("nowhere", (4, 6), "the checkpoint has no 'nowhere'"), ("0.weight", (5, 6), r"the adapter of '0.weight' is \[5, 3\]")],
)
def test_refuses_adapters_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    model = randomized(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), 1)
    ledger = normfuse.optimize(model, (torch.randn(2, 6),)).report.weights
    with pytest.raises(normfuse.NormfuseError, match=message):
        normfuse.carry_adapters(ledger, model.state_dict(), {name: adapter(torch.empty(*shape), 1)})


def test_refuses_two_adapters_of_one_tensor() -> None:
    model = gpt.build("small")
    ledger, state = normfuse.optimize(model, *gpt.example("small")).report.weights, model.state_dict()
    both = {name: adapter(state[name], seed) for seed, name in enumerate(("tokens.weight", "head.weight"))}
    with pytest.raises(normfuse.NormfuseError, match=r"'tokens.weight' and 'head.weight' are one"):
        normfuse.carry_adapters(ledger, state, both)
