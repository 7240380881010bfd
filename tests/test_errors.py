"""Bad input: one line of the family's errors that says what to do; models and files stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from tests.support import image, randomised


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.norm(x))


class Nothing(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return 3


class Branches(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return self.out(x) if float(x.sum()) > 0 else x


class Counts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls.add_(1)
        return self.out(x) * self.calls


class Writes(Small):
    def forward(self, x: torch.Tensor) -> Any:
        x.add_(1)
        return self.out(x)


def small() -> nn.Module:
    return randomised(Small())


X = image(2, 6)
Case = tuple[Callable[[], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "unknown pass": (
        lambda: normfuse.optimize(small(), (X,), passes=["layer_norm_to_rms"]),
        normfuse.PassError,
        "did you mean layer_norm_to_rms_norm",
    ),
    "passes as text": (lambda: normfuse.optimize(small(), (X,), passes="bake_weights"), normfuse.PassError, "take lists"),
    "no module": (lambda: normfuse.optimize(lambda x: x, (X,)), normfuse.CaptureError, "pass a torch.nn.Module"),
    "args no tuple": (lambda: normfuse.optimize(small(), X), normfuse.CaptureError, r"write \(x,\) rather than x"),
    "wrong args": (lambda: normfuse.optimize(small(), (X, X)), normfuse.CaptureError, "too many positional arguments"),
    "wrong shape": (lambda: normfuse.optimize(small(), (image(2, 5),)), normfuse.CaptureError, "check that model"),
    "training": (lambda: normfuse.optimize(small().train(), (X,)), normfuse.CaptureError, r"call model\.eval\(\) first"),
    "no tensor": (lambda: normfuse.optimize(randomised(Nothing()), (X,)), normfuse.CaptureError, "returns no tensor"),
    "branches": (lambda: normfuse.optimize(randomised(Branches()), (X,)), normfuse.CaptureError, "branches on values"),
    "state": (lambda: normfuse.optimize(randomised(Counts()), (X,)), normfuse.CaptureError, "writes to its buffer 'calls'"),
    "writes input": (lambda: normfuse.optimize(randomised(Writes()), (X,)), normfuse.CaptureError, "writes to its input"),
    "backend": (lambda: normfuse.optimize(small(), (X,), backend="fast"), normfuse.LoweringError, "unknown backend 'fast'"),
    "other dtype": (
        lambda: normfuse.optimize(small(), (X,))(X.double()),
        normfuse.InputError,
        "must be torch.float32, not torch.float64",
    ),
    "other rank": (lambda: normfuse.optimize(small(), (X,))(X[0]), normfuse.InputError, "must have shape"),
    "missing input": (lambda: normfuse.optimize(small(), (X,))(), normfuse.InputError, "missing"),
    "unknown kind": (lambda: normfuse.inspect(small(), (X,)).count("norm"), ValueError, "the kinds are"),
    "no file": (lambda: normfuse.load("nowhere.pt2"), normfuse.NormfuseError, "there is no file"),
    "report ending": (
        lambda: normfuse.optimize(small(), (X,)).report.save("report.txt"),
        normfuse.NormfuseError,
        "end the name in .json or .html",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_one_line_that_says_what_to_do(case: str) -> None:
    run, kind, text = CASES[case]
    with pytest.raises(kind, match=text) as caught:
        run()
    assert "\n" not in str(caught.value).strip()
    assert isinstance(caught.value, normfuse.NormfuseError | ValueError)


def test_where_a_capture_failed() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), Branches())

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    with pytest.raises(normfuse.CaptureError, match=r"in inner\.1 \(test_errors\.py:\d+\)"):
        normfuse.optimize(randomised(Deep()), (X,))


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"not an archive")
    with pytest.raises(normfuse.NormfuseError, match=r"is not a \.pt2 archive"):
        normfuse.load(path)
    assert path.read_bytes() == b"not an archive"


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    normfuse.optimize(small(), (X,)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(normfuse.NormfuseError):
        normfuse.load(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    with pytest.raises(normfuse.LoweringError, match="cannot write"):
        normfuse.optimize(small(), (X,)).save(occupied / "model.pt2")
    assert occupied.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("case", ["wrong shape", "branches", "state"])
def test_the_model_is_as_before(case: str) -> None:
    model = randomised({"wrong shape": Small, "branches": Branches, "state": Counts}[case]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(normfuse.CaptureError):
        normfuse.optimize(model, (image(2, 5) if case == "wrong shape" else X,))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
