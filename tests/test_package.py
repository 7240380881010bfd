"""The wheel, built and installed away from the checkout, has every module and imports it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .sources import ROOT, files, modules

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, json, pkgutil, sys

target = sys.argv[1]
sys.path.insert(0, target)
import normfuse
failed, found = {}, {"normfuse": normfuse.__file__}
for info in pkgutil.walk_packages(normfuse.__path__, "normfuse.", onerror=lambda name: None):
    if info.name.endswith("__main__"):
        continue
    try:
        found[info.name] = importlib.import_module(info.name).__file__
    except Exception as error:
        failed[info.name] = repr(error)
print(json.dumps({"found": found, "failed": failed}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in the checkout must not get in, nor anything be left behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in files():
        place = copy / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy), cwd=copy)
    [built] = out.glob("normfuse-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target
    )
    return target


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    wanted = {f"{name.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
              for name, path in modules().items()}  # fmt: skip
    assert set(names) == {*wanted, "normfuse/py.typed", "normfuse/lower/costs.json"}


def test_the_wheel_declares_its_entry_points_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [info] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "[torch_dynamo_backends]\nnormfuse = normfuse.backend:normfuse_backend" in points
    assert "[console_scripts]\nnormfuse = normfuse.cli.main:main" in points


def test_every_module_imports_from_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    said = json.loads(python("-c", IMPORT_ALL, str(installed), cwd=tmp_path))
    assert not said["failed"]
    assert set(said["found"]) == {name for name in modules() if not name.endswith("__main__")}
    strays = [file for file in said["found"].values() if not Path(file).is_relative_to(installed)]
    assert not strays, "imported from the checkout"


def test_a_users_own_passes_folder_does_no_harm(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes/__init__.py").write_text("MINE = True\n")
    use = "import passes\nfrom normfuse.passes import TABLE\nprint(passes.MINE, len(TABLE) > 0)\n"
    (tmp_path / "use.py").write_text(use)
    code = "import runpy, sys; sys.path[:0] = sys.argv[1:]; runpy.run_path('use.py')"
    assert python("-c", code, str(tmp_path), str(installed), cwd=tmp_path).split() == ["True", "True"]


def test_the_passes_are_refused_under_another_name() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import passes"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "normfuse.passes" in done.stderr


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
