"""Capture: every front end and every shape of inputs and outputs ends in one canonical program."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.capture.export import capture
from tests.support import assert_same_function, image, optimized, randomised


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.embed(x)))


# -- front ends ----------------------------------------------------------------------------------------------------


def test_module_exported_program_and_symbolic_trace_end_alike() -> None:
    model, x = randomised(Norms()), image(2, 5, 6)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    for source in (model, exported, torch.fx.symbolic_trace(model)):
        result = normfuse.optimize(source, (x,))
        assert_same_function(result)
        assert result.report.fired["layer_norm_to_rms_norm"] == 1
        torch.testing.assert_close(result(x), model(x))


def test_an_exported_program_brings_its_own_example() -> None:
    exported = torch.export.export(randomised(Norms()), (image(2, 5, 6),), strict=False)
    assert_same_function(normfuse.optimize(exported))


# -- inputs and outputs --------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = Norms()
        self.register_buffer("offset", torch.full((3,), 0.3), persistent=False)

    def forward(self, x: torch.Tensor, *, extra: dict[str, Any], flag: bool = True) -> dict[str, Any]:
        y = self.core(x + extra["a"][0]) + self.offset
        best = y.argmax(-1)
        return {"y": y, "more": (best, extra["b"] * 2, None, 7), "flag": flag}


def nested(batch: int = 2) -> dict[str, Any]:
    return {"extra": {"a": [image(batch, 5, 6, seed=3)], "b": torch.arange(batch)}}


def test_nested_inputs_outputs_integers_and_constants() -> None:
    model = randomised(Nested())
    result = (
        optimized(model, image(2, 5, 6), kwargs=None) if False else normfuse.optimize(model, (image(2, 5, 6),), nested())
    )
    assert_same_function(result)
    got, wanted = result(image(3, 5, 6), **nested(3)), model(image(3, 5, 6), **nested(3))
    assert got.keys() == wanted.keys()
    assert got["more"][2:] == (None, 7)
    assert got["flag"] is True
    assert torch.equal(got["more"][0], wanted["more"][0])
    torch.testing.assert_close(got["y"], wanted["y"])


def test_inputs_by_name_or_position() -> None:
    model, x = randomised(Norms()), image(2, 5, 6)
    result = normfuse.optimize(model, (x,))
    assert torch.equal(result(x), result(x=x))


def test_non_persistent_buffers_stay_out_of_the_state_dict() -> None:
    result = normfuse.optimize(randomised(Nested()), (image(2, 5, 6),), nested())
    assert not any("offset" in name for name in result.state_dict())


def test_tied_parameters_keep_their_identity() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x).sin())

    model = Tied().eval()
    program = capture(model, (torch.arange(6).view(2, 3),))
    assert program.origins["embed.weight"].names == ("embed.weight", "head.weight")
    assert [n for n in program.tensors if "weight" in n] == ["embed.weight"]


def test_in_place_operators_views_and_no_grad_leave_a_functional_graph() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(x * 2, inplace=True)
            y += 1
            y[:, 0] = 0
            with torch.no_grad():
                y = y.mul_(3)
            return y

    program = capture(InPlace().eval(), (image(2, 5, 6),))
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in program.graph.nodes)
    assert_same_function(normfuse.optimize(InPlace().eval(), (image(2, 5, 6),)))


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    length: torch.Tensor


torch.export.register_dataclass(Answer)


def test_dataclass_outputs() -> None:
    class Answers(Norms):
        def forward(self, x: torch.Tensor) -> Answer:  # type: ignore[override]
            return Answer(super().forward(x), torch.tensor([3]))

    result = normfuse.optimize(randomised(Answers()), (image(2, 5, 6),))
    assert_same_function(result)
    assert isinstance(result(image(2, 5, 6)), Answer)


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_and_sequence_vary_also_from_an_example_of_one(batch: int) -> None:
    model = randomised(Norms())
    result = normfuse.optimize(model, (image(batch, 5, 6),))
    for sizes in ((1, 5), (4, 5), (3, 9)):
        x = image(*sizes, 6)
        torch.testing.assert_close(result(x), model(x))


def test_fixed_when_asked() -> None:
    result = normfuse.optimize(randomised(Norms()), (image(2, 5, 6),), dynamic_shapes=None)
    with pytest.raises(normfuse.InputError, match="dimension 0 is fixed at 2 and cannot be 3"):
        result(image(3, 5, 6))


def test_named_shapes() -> None:
    batch = torch.export.Dim("batch", min=2, max=16)
    result = normfuse.optimize(randomised(Norms()), (image(2, 5, 6),), dynamic_shapes=({0: batch},))
    assert result(image(9, 5, 6)).shape == (9, 5, 3)
    with pytest.raises(normfuse.InputError):
        result(image(2, 4, 6))


def test_an_unrolled_length_is_found_out_and_fixed() -> None:
    """The exporter calls the length free although the loop over it was unrolled: only running it shows that."""

    class Unrolled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state, out = torch.zeros_like(x[:, 0]), []
            for t in range(int(x.shape[1])):
                state = torch.tanh(state + x[:, t])
                out.append(state)
            return torch.stack(out, 1)

    model = Unrolled().eval()
    result = normfuse.optimize(model, (image(2, 5, 6),))
    assert_same_function(result)
    torch.testing.assert_close(result(image(4, 5, 6)), model(image(4, 5, 6)))
    with pytest.raises(normfuse.InputError, match="fixed at 5"):
        result(image(2, 7, 6))


def test_images_of_convolutional_networks_vary_in_size() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    result = normfuse.optimize(model, (image(1, 3, 16, 16),))
    torch.testing.assert_close(result(image(2, 3, 20, 12)), model(image(2, 3, 20, 12)))


class Writes(nn.Module):
    """Writes in place to what other names may look at."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if self.how == "view, read no more":
            return F.relu_(y.flatten(1)) + 1
        if self.how == "view, base read after":
            F.relu_(y.flatten(1))
            return y + 1
        if self.how == "base, view read after":
            seen = y[:, :1]
            y.add_(3)
            return seen * y
        if self.how == "twice, first name read after":
            first = F.relu_(y)
            y.add_(3)
            return first * 2
        half, other = y.chunk(2, dim=1)
        half.add_(1)
        return y.sum(1) + other.sum(1)


@pytest.mark.parametrize(
    "how",
    ["view, read no more", "view, base read after", "base, view read after", "twice, first name read after", "chunks"],
)
def test_writes_in_place_are_seen_under_every_name(how: str) -> None:
    x = torch.randn(3, 4, 2)
    model = Writes(how).eval()
    again = normfuse.optimize(model, (x,), verify=False)
    torch.testing.assert_close(again(x), model(x))
