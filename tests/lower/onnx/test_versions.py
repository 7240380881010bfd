"""The oldest and the newest onnxruntime, onnx, onnxscript and transformers that pyproject.toml admits, each laid over what
is installed. Needs the package index."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.sources import ROOT

pytestmark = pytest.mark.slow

PACKAGES = ("onnxruntime", "onnx", "onnxscript", "transformers")
TOLD = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in %r}))" % (PACKAGES,)  # noqa: UP031
ARCHITECTURES = ("gpt2", "bert", "t5")


def floors() -> dict[str, str]:
    """What pyproject.toml says after >= of each package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for lines in extras.values() for line in lines)
    return {match[1]: match[2] for match in found if match and match[1] in PACKAGES}


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def install(site: Path, *wanted: str) -> None:
    done = python(site, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(site), *wanted)
    assert done.returncode == 0, done.stderr


def test_pyproject_says_from_which_version_each_is_admitted() -> None:
    assert sorted(floors()) == sorted(PACKAGES)


@pytest.mark.parametrize("age", ["oldest", "newest"])
def test_the_backend_works_with(age: str, tmp_path: Path) -> None:
    oldest = floors()
    install(tmp_path, *(f"{name}=={oldest[name]}" if age == "oldest" else name for name in PACKAGES))
    versions = json.loads(python(tmp_path, "-c", TOLD).stdout)
    if age == "oldest":
        assert all((versions[name] + ".0.").startswith(oldest[name] + ".") for name in PACKAGES), versions
    tests = [f"tests/lower/onnx/test_{name}.py" for name in ("session", "opened", "runtime")]
    leave_out = "(not every_size or " + " or ".join(ARCHITECTURES) + ") and not fastest"
    done = python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", leave_out)
    assert done.returncode == 0, f"{versions}\n{done.stdout[-4000:]}"
