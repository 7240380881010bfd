"""What the tests of passes share: random models, one pass at a time, and the questions asked of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse import Optimized

EXACT = 1e-12
"""Of a single layer: a few roundings of float64, far below any mistake."""


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Every parameter and running statistic away from its default, in eval mode."""
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        last = name.rpartition(".")[2]
        fan_in = max(1, value[0].numel() if value.dim() > 1 else 1)
        value.copy_(noise / fan_in**0.5 if value.dim() > 1 else 0.5 * noise + (last == "weight"))
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.copy_(torch.randn_like(value))
        elif name.endswith("running_var"):
            value.copy_(0.5 + 1.5 * torch.rand_like(value))
    return model.eval()


def images(channels: int, *sizes: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *sizes) + 0.7


def run(model: nn.Module, args: Sequence[Any], *names: str, **options: Any) -> Optimized:
    """The model after these passes alone."""
    return normfuse.optimize(model, tuple(args), passes=list(names), **options)


def ops(optimized: Optimized) -> Counter[str]:
    """How often each operator is called in the result."""
    calls = (n for n in optimized.graph_module.graph.nodes if n.op == "call_function")
    return Counter(str(getattr(n.target, "overloadpacket", n.target)).rpartition(".")[2] for n in calls)


def reasons(optimized: Optimized, name: str) -> str:
    return "\n".join(r.reason for r in optimized.report.refusals if r.pass_name == name)


def assert_same(optimized: Optimized, limit: float = EXACT) -> None:
    """Equal in float64 within `limit`, and in the model's own dtype as good as the model."""
    verification = optimized.report.verification
    assert verification is not None and not optimized.report.rolled_back, optimized.report.rolled_back
    assert verification.error_float64 <= limit
    assert verification.error_ratio <= 2


class Off(nn.Module):
    """The mutant: a model whose first output is off by one in a million."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs) * (1 + 1e-6)


def assert_mutant_fails(model: nn.Module, args: Sequence[Any], *names: str) -> None:
    wide = model.double()
    given = tuple(a.double() if a.is_floating_point() else a for a in args)
    optimized = run(wide, given, *names)
    assert optimized.report.fired
    assert normfuse.verify(wide, optimized, given)
    assert not normfuse.verify(wide, Off(optimized.graph_module).eval(), given)


def assert_idempotent(optimized: Optimized, args: Sequence[Any], *names: str) -> None:
    again = run(optimized, args, *names)
    assert not again.report.fired


def relative(candidate: Tensor, reference: Tensor) -> float:
    return float((candidate - reference).abs().max() / reference.abs().max())
