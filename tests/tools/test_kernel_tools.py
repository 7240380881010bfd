"""tools/dump_kernels.py and tools/bench_kernels.py, end to end in the interpreter."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is for Linux")

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(tool: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_dumped_kernels_need_torch_and_triton_alone(tmp_path: Path, run: Run) -> None:
    said = run("dump_kernels.py", str(tmp_path), "layer_norm", "--columns", "33", "--dtype", "float32")
    assert "layer_norm_backward.py" in said
    dumped: dict[str, Any] = {}
    for name in ("layer_norm", "layer_norm_backward"):
        imports = [line for line in (tmp_path / f"{name}.py").read_text(encoding="utf-8").splitlines() if "import" in line]
        assert imports == ["import torch", "import triton", "import triton.language as tl"]
        dumped[name] = runpy.run_path(str(tmp_path / f"{name}.py"))["run"]
    x, w, b = (t.requires_grad_() for t in (torch.randn(5, 33), torch.rand(33), torch.randn(33)))
    [y] = dumped["layer_norm"](x.detach(), w.detach(), b.detach())
    right = F.layer_norm(x, (33,), w, b, 1e-6)
    torch.testing.assert_close(y, right.detach())
    expected = torch.autograd.grad(right.sum(), (x, w, b))
    found = dumped["layer_norm_backward"](x.detach(), w.detach(), b.detach(), torch.ones_like(x))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.reshape(e.shape), e, atol=1e-5, rtol=1e-5)


def test_the_benchmark_runs_from_end_to_end(tmp_path: Path, run: Run) -> None:
    said = run("bench_kernels.py", str(tmp_path), "rms_norm", "dyt", "--tiny")
    cells = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["cells"]
    assert {(c["function"], c["direction"], c["peer"]) for c in cells} == {
        (function, direction, peer)
        for function in ("rms_norm", "dyt")
        for direction in ("forward", "backward")
        for peer in ("normfuse", "eager")
    }
    assert "| rms_norm | backward |" in said and (tmp_path / "kernels.md").is_file()
