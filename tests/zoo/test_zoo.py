"""Each entry is what it says: finite, away from its defaults, the same when built again."""

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
    [
        pytest.param(entry, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, entry in ZOO.items()
    ],
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
def run(model: nn.Module, entry: Entry, batch: int, length: int) -> list[torch.Tensor]:
    args, kwargs = entry.example(batch, length)
    return list(tensors(model(*args, **kwargs)))


def test_there_are_enough() -> None:
    assert len(HUGGING_FACE) >= 55
    assert len(TIMM) >= 65
    assert not set(HUGGING_FACE) & set(TIMM)


@everything
def test_an_entry_is_what_it_says(entry: Entry) -> None:
    model = built_twice_alike(entry)
    assert not model.training
    parameters_are_not_at_their_defaults(model)
    outputs_are_moderate_and_depend_on_inputs(model, entry)
    export_does_what_the_entry_says(model, entry)


def built_twice_alike(entry: Entry) -> nn.Module:
    before = torch.get_rng_state()
    first, second = entry.build(), entry.build()
    assert torch.equal(torch.get_rng_state(), before)
    again = second.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    return first


def parameters_are_not_at_their_defaults(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.numel() >= 8:
            assert value.std() > 0.01, name


def outputs_are_moderate_and_depend_on_inputs(model: nn.Module, entry: Entry) -> None:
    lengths = [entry.length]
    if entry.vary_length:
        lengths.append(entry.length + (32 if "vision" in entry.tags else 40 if entry.length > 100 else 4))
    for batch, length in ((2, lengths[0]), (3, lengths[-1])):
        outputs = run(model, entry, batch, length)
        assert outputs
        assert all(each.isfinite().all() and each.abs().max() < 1e4 for each in outputs)
        first = next(each for each in outputs if each.ndim)  # some models return a loss
        # A signal that vanishes in the biases would hide every bug behind it.
        assert (first[0] - first[1]).abs().max() > 1e-3 * first.abs().max()


def export_does_what_the_entry_says(model: nn.Module, entry: Entry) -> None:
    args, kwargs = entry.example()
    if entry.exportable:
        torch.export.export(model, args, kwargs, strict=False)
        return
    assert entry.reason
    with pytest.raises(Exception, match=r".+"):
        torch.export.export(model, args, kwargs, strict=False)


def test_every_exportable_entry_is_counted() -> None:
    assert set(COUNTS) == {name for name, entry in ZOO.items() if entry.exportable}
    for name, counts in COUNTS.items():
        assert set(counts) <= KINDS, name
        assert all(count > 0 for count in counts.values()), name
