"""Optimizing leaves the rest of the process alone: other threads serve models meanwhile, and optimize too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import normfuse
from normfuse.capture.export import capture
from normfuse.evaluate.float64 import run_float64
from normfuse.evaluate.promote import in_float64
from normfuse.graph.node import aten
from tests.support import assert_same_function, image, randomised


class Block(nn.Module):
    """Divides integers and makes tensors without a dtype: what would follow torch's default dtype."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[0]) / 7 + torch.full((1,), 0.1)
        return self.last(torch.tanh(self.norm(self.first(x)) + steps[:, None])) * torch.where(x[:, :1] > 0, 0.3, 1.1)


X = image(3, 6)


def served(model: Callable[[torch.Tensor], torch.Tensor], done: threading.Event) -> int:
    """How many calls gave what the first one gave, until it is done. Raises at the first that did not."""
    calls, wanted = 0, model(X)
    with torch.no_grad():
        while not done.is_set() or calls < 10:
            got = model(X)
            assert got.dtype == torch.float32
            assert torch.equal(got, wanted)
            assert torch.zeros(1).dtype == torch.float32
            calls += 1
    return calls


def test_models_are_served_while_others_optimize() -> None:
    eager, done = randomised(Block()), threading.Event()
    optimized = normfuse.optimize(randomised(Block()), (X,))
    assert_same_function(optimized)
    with ThreadPoolExecutor(6) as threads:
        serving = [threads.submit(served, model, done) for model in (eager, optimized)]
        try:
            each = [threads.submit(normfuse.optimize, randomised(Block(8 * n), seed=n), (X,)) for n in range(1, 5)]
            for result in each:
                assert_same_function(result.result())
        finally:
            done.set()
        assert all(result.result() >= 10 for result in serving)
    assert torch.get_default_dtype() == torch.float32


def test_what_follows_the_default_dtype_is_float64_in_float64() -> None:
    class Defaults(nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
            made = torch.full((2,), 0.1), torch.linspace(0, 1, 4), torch.arange(0, 1, 0.3), torch.eye(2) / 3
            ratios = n / 7, n * 0.1, n.sqrt(), torch.where(n > 2, 0.1, 0.7), torch.where(n > 2, n, 0.1), (n > 2) / 3
            return *made, *ratios, x.sum() * torch.ones(2) / 3

    x, n = image(3, 6), torch.arange(5)
    program = capture(Defaults().eval(), (x, n))
    found = run_float64(program, [[x, n]])[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = Defaults()(x.double(), n)
    finally:
        torch.set_default_dtype(before)
    assert [f.dtype for f in found] == [torch.float64] * len(wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-15, atol=1e-15)


def test_no_other_default_dtype_is_taken_for_float64() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = in_float64(aten.full.default, ([2], 0.1), {})
        ratio = in_float64(aten.div.Tensor, (torch.tensor([1]), torch.tensor([3])), {})
    finally:
        torch.set_default_dtype(before)
    assert made.dtype == ratio.dtype == torch.float64
    assert made.tolist() == [0.1, 0.1]
    assert ratio.item() == 1 / 3
