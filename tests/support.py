"""What the tests of passes share: parameters away from their defaults, and the questions asked of every rewrite."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import normfuse

EXACT = 1e-10


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluation mode, every parameter and statistic away from its default, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if "running_var" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator).to(tensor.dtype))
        elif "bias" in name or "running_mean" in name:
            tensor.copy_(0.3 * noise(tensor))
        elif tensor.dim() <= 1:
            tensor.copy_(1 + 0.3 * noise(tensor))
        else:
            tensor.copy_(noise(tensor) / tensor[0].numel() ** 0.5 + 0.1)
    return model.eval()


def image(*sizes: int, seed: int = 1) -> torch.Tensor:
    """Floats with a mean."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.7


def ids(*sizes: int, vocabulary: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocabulary, sizes, generator=torch.Generator().manual_seed(seed))


def optimized(model: nn.Module, *args: Any, passes: Sequence[Any] | None = None, **kwargs: Any) -> normfuse.Optimized:
    """Optimized and proved: the verification must have accepted everything, with nothing rolled back."""
    before = copy.deepcopy(model.state_dict())
    result = normfuse.optimize(model, args, passes=passes, **kwargs)
    assert_same_function(result)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the user's model was changed"
    return result


def assert_same_function(result: normfuse.Optimized) -> None:
    verdict = result.report.verification
    assert verdict is not None
    assert not result.report.rolled_back, result.report.rolled_back
    assert verdict.error_float64 < EXACT
    assert verdict.error_ratio <= 2
    assert verdict


def reasons(result: normfuse.Optimized, pass_name: str) -> list[str]:
    return [r.reason for r in result.report.refusals if r.pass_name == pass_name]


def operators(result: normfuse.Optimized) -> list[str]:
    """Names of the operators in the result, in order: `layer_norm`, `linear`, ..."""
    nodes = result.graph_module.graph.nodes
    return [n.target._opname for n in nodes if n.op == "call_function" and hasattr(n.target, "_opname")]


def assert_rolled_back(model: nn.Module, *args: Any, pass_name: str) -> normfuse.Optimized:
    """With a broken pass in the table: what it did is undone and named, the result is still the model's function."""
    result = normfuse.optimize(model, args)
    assert {r.pass_name for r in result.report.rolled_back} == {pass_name}, result.report.rolled_back
    assert all(r in result.report.refusals for r in result.report.rolled_back)
    verdict = result.report.verification
    assert verdict
    assert verdict.error_float64 < EXACT
    assert normfuse.verify(model, result, args)
    return result


def assert_idempotent(result: normfuse.Optimized, *args: Any, pass_name: str) -> None:
    """What a pass has made gives it nothing more to do."""
    again = normfuse.optimize(result.graph_module, args, passes=[pass_name])
    assert again.report.fired.get(pass_name, 0) == 0
