"""An ONNX file as a module, and what is said where file, weights or inputs do not fit."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse
from normfuse.lower.onnx import OnnxFile
from normfuse.lower.onnx.file import write
from normfuse.lower.onnx.run import runtime


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)
        nn.init.normal_(self.norm.weight, 1.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.linear(self.norm(x)), "places": ids + 1}


X, IDS = torch.randn(2, 64) + 1, torch.arange(2)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with its weights beside it."""
    monkeypatch.setattr(write, "EMBEDDED", 10)
    normfuse.export_onnx(Small().eval(), tmp_path / "small.onnx", (X, IDS))
    return tmp_path / "small.onnx"


def test_a_file_is_a_module(written: Path) -> None:
    opened = OnnxFile(written)
    told = opened(X, ids=IDS)
    assert set(told) == {"y", "places"}
    assert torch.equal(told["places"], IDS + 1)
    again = pickle.loads(pickle.dumps(opened))(X, IDS)
    assert torch.equal(again["y"], told["y"])


def test_calls_from_several_threads_do_not_mix(written: Path) -> None:
    opened = OnnxFile(written)
    batches = [torch.randn(n + 1, 64) for n in range(16)]
    alone = [opened(x, torch.arange(len(x)))["y"] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: opened(x, torch.arange(len(x)))["y"], batches * 4))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 4, strict=True))


def test_a_file_that_is_cut_short_is_told(written: Path) -> None:
    whole = written.read_bytes()
    for size in (0, 1, 20, len(whole) // 3, len(whole) // 2, len(whole) - 7):
        written.write_bytes(whole[:size])
        with pytest.raises(normfuse.LoweringError, match=r"small\.onnx"):
            OnnxFile(written)


def test_weights_that_are_missing_or_cut_short_are_told(written: Path) -> None:
    data = written.parent / "small.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(normfuse.LoweringError, match=r"weights of .* are cut short"):
        OnnxFile(written)
    data.unlink()
    with pytest.raises(normfuse.LoweringError, match=r"weights of .* are missing: .*small\.onnx\.data is not there"):
        OnnxFile(written)
    with pytest.raises(normfuse.LoweringError, match="there is no file"):
        OnnxFile(written.parent / "other.onnx")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((X.double(), IDS), r"'x' must be torch\.float32, not torch\.float64"),
        ((X[None], IDS), r"'x' must have the sizes .*, not \[1, 2, 64\]"),
        ((X[:, :9], IDS), r"'x' must have the sizes .*64\], not \[2, 9\]"),
        ((X,), "takes the inputs x, ids"),
        ((X, [0, 1]), "'ids' must be a tensor, not list"),
    ],
)
def test_inputs_that_do_not_fit_are_told(written: Path, args: tuple[object, ...], said: str) -> None:
    with pytest.raises(normfuse.InputError, match=said):
        OnnxFile(written)(*args)


def test_an_old_onnxruntime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    with pytest.raises(normfuse.LoweringError, match=r"needs onnxruntime 1\.23 or newer .* not 1\.22\.1"):
        runtime.check_provider()
    for fine in ("1.23.0", "1.31.1", "2.0.0", "1.24.0.dev20260101"):
        monkeypatch.setattr(onnxruntime, "__version__", fine)
        assert runtime.check_provider() == "CPUExecutionProvider"
