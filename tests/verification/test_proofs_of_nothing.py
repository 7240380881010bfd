"""What was not compared is not equivalent, and what was not varied is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.capture.export import capture
from normfuse.verification.inputs import draws
from tests.support import ids, image, randomised


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


class Nowhere(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.nan


class PartlyNowhere(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y.clamp(max=0) / 0.0


class Masked(Model):
    """A mask of ones hides what stands for the masked."""

    def __init__(self, fill: float = 0.0) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x.masked_fill(mask == 0, self.fill))


class Inverted(Masked):
    """A mask that says what to leave out."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return Model.forward(self, x.masked_fill(mask, self.fill))


class Embedded(nn.Module):
    def __init__(self, rows: int = 5) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(rows, 8), nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x))


X = image(3, 6)
ONES = torch.ones(3, 6, dtype=torch.long)


@pytest.mark.parametrize("model", [Nowhere, PartlyNowhere])
def test_outputs_that_are_nan_everywhere_prove_nothing(model: type[Model]) -> None:
    one, other = randomised(model(), 1), randomised(model(), 2)
    for candidate in (one, other):
        verdict = normfuse.verify(one, candidate, (X,))
        assert not verdict
        assert not verdict.equivalent
    assert "nothing was compared" in normfuse.verify(one, one, (X,)).reason
    with pytest.raises(normfuse.VerificationError, match=r"nothing was compared: output \d is NaN or"):
        normfuse.optimize(one, (X,))
    assert normfuse.optimize(one, (X,), verify=False).report.verification is None


def test_an_empty_batch_proves_nothing() -> None:
    one = randomised(Model())
    verdict = normfuse.verify(one, one, (X[:0],))
    assert not verdict
    assert "nothing was compared: the outputs are empty" in str(verdict)
    with pytest.raises(normfuse.VerificationError, match="the outputs are empty"):
        normfuse.optimize(one, (X[:0],))


def test_some_numbers_among_nan_are_compared() -> None:
    class Holes(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(x[:, :1] > 0.7, torch.nan)

    one = randomised(Holes())
    assert normfuse.verify(one, one, (X,))
    assert not normfuse.verify(one, randomised(Holes(), 2), (X,))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_a_constant_example_is_drawn_anew(value: float) -> None:
    """At a constant input the two are the same function, even at all constant inputs."""

    class Spread(Model):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.by * (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True)

    one, other = randomised(Spread(1.0)), randomised(Spread(2.0))
    x = torch.full((3, 6), value)
    verdict = normfuse.verify(one, one, (x,))
    assert verdict
    assert not verdict.notes
    assert not normfuse.verify(one, other, (x,))


@pytest.mark.parametrize("model", [Masked, Inverted])
def test_a_mask_of_one_value_gets_the_other(model: type[Masked]) -> None:
    mask = ONES if model is Masked else torch.zeros(3, 6, dtype=torch.bool)
    one, other = randomised(model(0.0)), randomised(model(1.0))
    verdict = normfuse.verify(one, one, (X, mask))
    assert verdict
    assert not verdict.notes
    assert not normfuse.verify(one, other, (X, mask))


def test_constant_ids_are_varied_where_the_model_has_others() -> None:
    one = randomised(Embedded())
    for start in (torch.zeros(2, 7, dtype=torch.long), torch.full((2, 7), 3)):
        verdict = normfuse.verify(one, one, (start,))
        assert verdict
        assert not verdict.notes
    single = randomised(Embedded(rows=1))
    verdict = normfuse.verify(single, single, (torch.zeros(2, 7, dtype=torch.long),))
    assert verdict
    assert verdict.notes == ("the input 'x' was never varied",)


def test_what_was_never_varied_is_named() -> None:
    mask = ONES.clone()
    mask[:, 4:] = 0
    one = randomised(Masked())
    verdict = normfuse.verify(one, one, (X, mask))
    assert verdict
    assert verdict.notes == ("the input 'mask' was never varied",)
    assert str(verdict).endswith("; the input 'mask' was never varied")
    report = normfuse.optimize(one, (X, mask)).report
    assert report.verification
    assert report.verification.notes == verdict.notes
    saved = json.loads(json.dumps(report.verification.to_dict()))
    assert normfuse.Verification(**saved) == report.verification
    assert normfuse.verify(one, one, (X, mask), trials=1).notes == ("compared on the example alone",)


def drawn(
    model: nn.Module, *inputs: Tensor, accepts: Callable[[list[Any]], bool] = lambda leaves: True
) -> Iterator[list[Tensor]]:
    captured = capture(model, inputs)
    return draws(captured.signature, list(inputs), accepts)


def test_a_mask_keeps_the_first_place_of_every_row() -> None:
    trials = drawn(randomised(Masked()), X, ONES)
    next(trials)
    for _ in range(20):
        _, mask = next(trials)
        assert set(mask.unique().tolist()) <= {0, 1}
        assert bool((mask[..., 0] == 1).all())
        assert bool((mask[..., 1:] <= mask[..., :-1]).all())


def test_what_the_model_refuses_stays() -> None:
    trials = drawn(randomised(Masked()), X, ONES, accepts=lambda leaves: torch.equal(leaves[1], ONES))
    for _ in range(4):
        x, mask = next(trials)
        assert x.shape == X.shape
        assert torch.equal(mask, ONES)
    only = drawn(randomised(Masked()), X, ONES, accepts=lambda leaves: False)
    assert [leaves[0] is X for leaves in only] == [True]


def test_a_constant_keeps_its_sign_and_a_varied_example_its_spread() -> None:
    trials = drawn(randomised(Model()), torch.full((64, 6), 2.0))
    next(trials)
    (x,) = next(trials)
    assert bool((x > 1).all()) and bool((x < 3).all()) and x.unique().numel() > 1
    trials = drawn(randomised(Embedded()), ids(4, 9, vocabulary=5))
    next(trials)
    assert set(next(trials)[0].unique().tolist()) <= set(range(5))
