"""The demo, with a model of one layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..sources import ROOT


@pytest.mark.slow
def test_the_demo_runs_and_leaves_its_results(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--layers", "1", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"report.html", "report.json", "gpt2.onnx"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    answers = {row[1].strip(): row[2].strip() for line in done.stdout.splitlines() if len(row := line.split("│")) == 4}
    assert answers["the same function"] == "yes"
    assert float(answers["error with both in float64"]) < 1e-10
    assert float(answers["error of the ONNX file in onnxruntime"]) < 1e-4
