"""Conditions on sizes: what the model's own Python asked while it was captured holds, or the call is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.capture.export import capture
from normfuse.graph.conditions import Condition
from normfuse.lower.onnx import OnnxFile
from tests.lower.onnx import runs as onnx_runs
from tests.support import randomised


class Patches(nn.Module):
    """Pads images whose width is no multiple of 4, as vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] % 4 != 0:
            x = F.pad(x, (0, 4 - x.shape[3] % 4))
        return self.norm(self.embed(x)).flatten(2).mean(-1)


class Steps(nn.Module):
    """Two questions about the length, one of them with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 3 == 0:
            x = x - x.mean(1, keepdim=True)
        return self.norm(x) * (2.0 if x.shape[1] > x.shape[0] else 3.0)


@pytest.fixture(scope="module")
def patches() -> tuple[nn.Module, normfuse.Optimized]:
    model = randomised(Patches())
    return model, normfuse.optimize(model, (torch.randn(2, 3, 16, 16),))


def test_sizes_that_take_another_branch_are_refused(patches: tuple[nn.Module, normfuse.Optimized]) -> None:
    model, result = patches
    for size in ((3, 3, 12, 20), (1, 3, 15, 8)):
        x = torch.randn(size)
        torch.testing.assert_close(result(x), model(x))
    words = r"test_conditions\.py:\d+\), and was captured where x\.shape\[3\] % 4 == 0"
    with pytest.raises(normfuse.InputError, match=words):
        result(torch.randn(2, 3, 16, 18))


def test_every_question_of_the_model_counts() -> None:
    model = randomised(Steps())
    result = normfuse.optimize(model, (torch.randn(2, 5, 8),))
    assert len(result.program.signature.conditions) == 2
    for size in ((4, 7, 8), (1, 4, 8)):
        x = torch.randn(size)
        torch.testing.assert_close(result(x), model(x))
    for size in ((2, 6, 8), (5, 4, 8)):
        with pytest.raises(normfuse.InputError, match="branches on its input sizes"):
            result(torch.randn(size))


def test_a_model_that_asks_nothing_has_none() -> None:
    program = capture(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)).eval(), (torch.randn(2, 3, 9, 9),))
    assert not program.signature.conditions


def test_conditions_are_kept_by_archives(patches: tuple[nn.Module, normfuse.Optimized], tmp_path: Path) -> None:
    model, result = patches
    result.save(tmp_path / "patches.pt2")
    loaded = normfuse.load(tmp_path / "patches.pt2")
    x = torch.randn(2, 3, 12, 8)
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.raises(normfuse.InputError, match=r"x\.shape\[3\] % 4 == 0"):
        loaded(torch.randn(2, 3, 16, 18))


def test_conditions_are_told_with_onnx_files(patches: tuple[nn.Module, normfuse.Optimized], tmp_path: Path) -> None:
    model, result = patches
    path = tmp_path / "patches.onnx"
    told = result.export_onnx(path)
    assert told.conditions == ("width % 4 == 0",)
    assert "width % 4 == 0" in str(told)
    said = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    assert json.loads(said["normfuse.conditions"]) == ["width % 4 == 0"]
    x = torch.randn(2, 3, 12, 8)
    file = OnnxFile(path)
    assert onnx_runs.error_ratio(model, [((x,), {})], lambda example: list(file(*example[0]).values())) <= 2
    with pytest.raises(normfuse.InputError, match=r"patches\.onnx: .* was captured where width % 4 == 0"):
        file(torch.randn(2, 3, 16, 18))


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "x.shape", "[n for n in ()]", "n ==", "pow(n, n) > 1"])
def test_a_condition_is_arithmetic_and_nothing_else(text: str) -> None:
    with pytest.raises(normfuse.CaptureError, match="condition on sizes"):
        Condition(text).holds({"n": 3})
    with pytest.raises(normfuse.CaptureError, match="condition on sizes"):
        Condition(text).told({"n": "m"})


def test_a_condition_is_read_as_python() -> None:
    condition = Condition("max(1, n // 4) % 2 == 0 and m != 1")
    assert condition.names == {"n", "m"}
    assert condition.holds({"n": 8, "m": 2})
    assert not condition.holds({"n": 8, "m": 1})
    assert condition.told({"n": "x.shape[2]"}) == "max(1, x.shape[2] // 4) % 2 == 0 and m != 1"
