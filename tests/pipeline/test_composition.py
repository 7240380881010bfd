"""All passes together: one function, whatever meets what, in whatever order the names are given."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse import models
from normfuse.passes import TABLE
from normfuse.pipeline.select import select
from tests.passes.checking import assert_same, images, ops, randomized

EXACT = 1e-10
NAMES = [rule.name for rule in TABLE if rule.exactness.exact and not rule.on_request]
SPECIMENS = {name: "small" for name in models.names()}


class Adapted(nn.Module):
    """A linear with an adapter, whose own scale stands behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(width, width), nn.Linear(width, 2, bias=False), nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1.5 * self.b(self.a(x))


class Transformer(nn.Module):
    """Adapters, layer scales, scaled norms, an embedding scale, a weight norm, a token norm at the end."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, width), nn.Parameter(torch.ones(1, 6, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.inner = nn.ModuleList(Adapted(width) for _ in range(4))
        self.outer = nn.ModuleList(nn.utils.parametrizations.weight_norm(nn.Linear(width, width)) for _ in range(4))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(4))
        self.last, self.head = nn.BatchNorm1d(width), nn.Linear(width, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.tokens(ids) + self.places) * 12**0.5
        for place, (norm, inner, outer, gain) in enumerate(zip(self.norms, self.inner, self.outer, self.gains, strict=True)):
            x = x + gain * outer(F.gelu(inner(norm(x) / (place + 1) ** 0.5)))
        return self.head(self.last(F.layer_norm(x, [12]).transpose(1, 2)).transpose(1, 2))


class Branched(nn.Module):
    """An adapter on a convolution, whose norm folds; branches of it merge; the norm behind them goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 2, 3, 2, 1), nn.Conv2d(2, 8, 1)
        self.norm, self.side = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 1, 2)
        self.second = nn.BatchNorm2d(8)
        self.wide, self.dense = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.third, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.base(x) + 0.5 * self.b(self.a(x))) + 0.3 * self.side(x)
        y = self.dense(self.wide(self.second(torch.tanh(y))))
        return self.head(self.third(F.relu(y)).mean((2, 3)))


def specimen(name: str, config: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    module = models.load(name)
    args, kwargs = module.example(config)
    return module.build(config), args, kwargs


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {
    **{name: (lambda n=name, c=config: specimen(n, c)) for name, config in SPECIMENS.items()},
    "adapted transformer": lambda: (randomized(Transformer()), (torch.randint(20, (2, 6)),), {}),
    "branched network": lambda: (randomized(Branched()), (images(3, 15, 15),), {}),
}


def test_there_are_enough_models() -> None:
    assert len(CASES) >= 12


@pytest.mark.parametrize("name", CASES)
def test_all_passes_together_keep_the_function(name: str) -> None:
    model, args, kwargs = CASES[name]()
    optimized = normfuse.optimize(model, args, kwargs)
    assert_same(optimized, EXACT)
    assert optimized.report.fired


@pytest.mark.parametrize("name", ["adapted transformer", "branched network", "gpt", "repvgg", "vit"])
def test_the_order_of_the_names_does_not_matter(name: str) -> None:
    model, args, kwargs = CASES[name]()
    shuffled = list(NAMES)
    random.Random(3).shuffle(shuffled)
    first, second = (normfuse.optimize(model, args, kwargs, passes=names) for names in (NAMES, shuffled))
    for optimized in (first, second):
        assert_same(optimized, EXACT)
    assert first.report.fired == second.report.fired
    assert str(first.graph_module.graph) == str(second.graph_module.graph)


def test_every_order_of_the_names_selects_the_same_rules_in_the_same_order() -> None:
    """What runs is then the same for every model, those above and any other."""
    names = [rule.name for rule in TABLE]
    for seed in range(20):
        source = random.Random(seed)
        some = source.sample(names, source.randint(1, len(names)))
        assert select(TABLE, some) == tuple(rule for rule in TABLE if rule.name in some)


def test_what_meets_composes() -> None:
    model, args, _ = CASES["branched network"]()
    optimized = normfuse.optimize(model, args)
    assert ops(optimized) == {"conv2d": 2, "tanh": 1, "relu": 1, "mean": 1, "linear": 1}
    model, args, _ = CASES["adapted transformer"]()
    optimized = normfuse.optimize(model, args)
    assert not {"batch_norm", "mul", "div"} & set(ops(optimized))
    assert ops(optimized)["linear"] == 9


def test_a_second_run_finds_nothing_but_what_the_first_left() -> None:
    model, args, kwargs = CASES["branched network"]()
    once = normfuse.optimize(model, args, kwargs)
    assert not normfuse.optimize(once, args, kwargs).report.fired
