"""tools/dump_kernels.py and tools/bench_kernels.py, end to end in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    call = [sys.executable, *arguments]
    return subprocess.run(call, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


DUMPED = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, layer_norm, layer_norm_backward
x, w, b = torch.randn(5, 33), torch.rand(33), torch.randn(33)
[y] = layer_norm.run(x, w, b)
assert torch.allclose(y, torch.nn.functional.layer_norm(x, (33,), w, b, 1e-6), atol=1e-6)
leaves = [t.requires_grad_() for t in (x.clone(), w.clone(), b.clone())]
expected = torch.autograd.grad(torch.nn.functional.layer_norm(leaves[0], (33,), *leaves[1:], 1e-6).sum(), leaves)
for found, right in zip(layer_norm_backward.run(x, w, b, torch.ones_like(x)), expected):
    assert torch.allclose(found.reshape(right.shape), right, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("normfuse")]
"""


def test_dumped_kernels_run_without_normfuse(tmp_path: Path) -> None:
    said = run("tools/dump_kernels.py", str(tmp_path), "layer_norm", "--columns", "33", "--dtype", "float32")
    assert "layer_norm_backward.py" in said
    run("-c", DUMPED, str(tmp_path))


def test_the_benchmark_runs_from_end_to_end(tmp_path: Path) -> None:
    said = run("tools/bench_kernels.py", str(tmp_path), "rms_norm", "dyt", "--tiny")
    cells = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["cells"]
    assert {(c["function"], c["direction"], c["peer"]) for c in cells} == {
        (function, direction, peer)
        for function in ("rms_norm", "dyt")
        for direction in ("forward", "backward")
        for peer in ("normfuse", "eager")
    }
    assert "| rms_norm | backward |" in said and (tmp_path / "kernels.md").is_file()
