"""The README does what it says: its Python and its commands run, and its table of passes is that of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .sources import ROOT, PassDoc, pass_table

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BEGIN, END = "<!-- passes:begin -->\n", "<!-- passes:end -->"
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("normfuse ")
]
RUN_COMMAND = "import sys; sys.argv[0] = 'normfuse'; from normfuse.cli.main import main; main()"


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        above = "\n" * TEXT.count("\n", 0, block.start(1))  # so that a traceback shows the README's own line
        exec(compile(above + block.group(1), str(README), "exec"), names)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMAND, *shlex.split(command)[1:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "a command that says nothing"


def test_there_are_commands() -> None:
    assert COMMANDS


def test_the_table_of_passes_is_that_of_the_code(update_golden: bool) -> None:
    table = passes_table()
    head, rest = TEXT.split(BEGIN)
    written, tail = rest.split(END)
    if update_golden:
        README.write_text(head + BEGIN + table + END + tail, encoding="utf-8")
        return
    assert written == table, "write the table anew: pytest --update-golden tests/test_readme.py"


def passes_table() -> str:
    rows = [row(PassDoc.of(ROOT / "passes" / f"{rule.name}.py")) for rule in pass_table()]
    return "\n".join(("| pass | rewrite | exactness | legal if |", "|---|---|---|---|", *rows, ""))


def row(doc: PassDoc) -> str:
    formula = re.sub(r"\s*->\s*", " → ", doc.formula).replace("|", "\\|")
    exactness = doc.sections["Exactness"].split(".")[0].split(",")[0].strip()
    legal = doc.sections["Legal if"].replace("|", "\\|")
    return f"| [`{doc.stem}`](passes/{doc.stem}.py) | `{formula}` | {exactness} | {legal} |"
