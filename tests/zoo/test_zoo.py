"""Each entry is what it says: finite, away from its defaults, read by its output, the same when built again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.counts import COUNTS, KINDS
from tests.zoo.entry import Entry
from tests.zoo.hugging_face import HUGGING_FACE
from tests.zoo.timm_models import TIMM

ZOO: dict[str, Entry] = HUGGING_FACE | TIMM
FEW = ("gpt2", "gemma", "bert", "t5", "clip", "wav2vec2", "resnet", "resnet10t", "vit_qk_norm")
everything = pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=name, marks=() if name in FEW else pytest.mark.slow) for name, entry in ZOO.items()],
)


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of nested outputs."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from tensors(each)
    elif isinstance(output, tuple | list):
        for each in output:
            yield from tensors(each)


@torch.no_grad()
def run(model: nn.Module, entry: Entry, batch: int, length: int | None = None) -> list[torch.Tensor]:
    args, kwargs = entry.example(batch, length)
    return list(tensors(model(*args, **kwargs)))


def test_there_are_enough() -> None:
    assert len(HUGGING_FACE) >= 55
    assert len(TIMM) >= 65
    assert not set(HUGGING_FACE) & set(TIMM)


@everything
def test_outputs_are_finite_and_moderate(entry: Entry) -> None:
    model = entry.build()
    assert not model.training
    for outputs in (run(model, entry, 2), run(model, entry, 3)):
        assert outputs
        for each in outputs:
            assert each.isfinite().all()
            assert each.abs().max() < 1e4
    if entry.vary_length:
        longer = entry.length + (32 if "vision" in entry.tags else 40 if entry.length > 100 else 4)
        assert all(each.isfinite().all() for each in run(model, entry, 2, longer))


@everything
def test_outputs_depend_on_inputs(entry: Entry) -> None:
    """A signal that vanishes in the biases would hide every bug behind it."""
    first = run(entry.build(), entry, 2)[0]
    if first.ndim:
        assert (first[0] - first[1]).abs().max() > 1e-2 * first.abs().max()


@everything
def test_parameters_are_not_at_their_defaults(entry: Entry) -> None:
    for name, value in entry.build().named_parameters():
        if value.is_floating_point() and value.numel() > 1:
            assert value.std() > 0.01, name


@everything
def test_another_build_is_the_same_model(entry: Entry) -> None:
    before = torch.get_rng_state()
    first, second = entry.build().state_dict(), entry.build().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@everything
def test_export_does_what_the_entry_says(entry: Entry) -> None:
    args, kwargs = entry.example()
    model = entry.build()
    if entry.exportable:
        torch.export.export(model, args, kwargs, strict=False)
    else:
        with pytest.raises(Exception, match=r".+"):
            torch.export.export(model, args, kwargs, strict=False)


def test_every_exportable_entry_is_counted() -> None:
    assert set(COUNTS) == {name for name, entry in ZOO.items() if entry.exportable}
    for name, counts in COUNTS.items():
        assert set(counts) <= KINDS, name
        assert all(count > 0 for count in counts.values()), name
