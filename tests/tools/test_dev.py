"""tools/dev.py before it has set anything up; CI runs the rest of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..sources import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/dev.py", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def dev(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", str(checkout / "tools/dev.py"), *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [("--help",), ("test", "--help")])
def test_help_teaches(checkout: Path, arguments: tuple[str, ...]) -> None:
    done = dev(checkout, *arguments)
    assert done.returncode == 0
    assert all(f"python3 tools/dev.py {command}" in done.stdout for command in ("demo", "test", "test -- -k"))
    assert not (checkout / ".venv").exists()


def test_an_unknown_command_is_told(checkout: Path) -> None:
    done = dev(checkout, "tset")
    assert done.returncode == 2
    assert "demo" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_environment_of_someone_elses_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/mine").touch()
    done = dev(checkout, "test")
    assert done.returncode == 1
    assert done.stderr.startswith("error: .venv was not made by tools/dev.py")
    assert [path.name for path in (checkout / ".venv").iterdir()] == ["mine"]
