"""Long work says what it is doing, to whoever listens."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import normfuse
from normfuse.progress import LOGGER, shown
from tests.support import image, randomised


def model() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)))


def test_the_stages_are_log_records_in_their_order(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="normfuse"):
        normfuse.optimize(model(), (image(3, 6),))
    said = caplog.messages
    places = [said.index(stage) for stage in ("capture", "raise", "fold_norm_affine", "bake", "lower to torch")]
    assert places == sorted(places)
    assert any(line.startswith("bake ") for line in said)


def test_a_listener_hears_until_it_leaves() -> None:
    heard: list[str] = []
    with shown(heard.append):
        normfuse.inspect(model(), (image(3, 6),))
    before = len(heard)
    assert "raise" in heard
    normfuse.inspect(model(), (image(3, 6),))
    assert len(heard) == before
    assert not LOGGER.handlers
    assert LOGGER.level == logging.NOTSET


def test_nothing_is_printed_unasked(capfd: pytest.CaptureFixture[str]) -> None:
    normfuse.optimize(model(), (torch.randn(3, 6),))
    assert capfd.readouterr() == ("", "")
