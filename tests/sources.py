"""The repository as text: its files, its modules, who imports whom, and what the passes say of themselves."""

from __future__ import annotations

import ast
import importlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADINGS = ("Exactness", "Legal if", "Leaves alone", "Reference")
HOMES = {"normfuse": "normfuse", "passes": "normfuse.passes", "models": "normfuse.models", "tools": "tools"}
"""Folder at the root -> the name it is imported by."""


@cache
def files() -> tuple[Path, ...]:
    """Every file that git tracks, or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    return tuple(sorted(path for name in set(listed) if name and (path := ROOT / name).is_file()))


def sources(folder: str) -> tuple[Path, ...]:
    """The Python files below a folder of the root."""
    return tuple(path for path in files() if path.suffix == ".py" and path.is_relative_to(ROOT / folder))


def pass_files() -> tuple[Path, ...]:
    return tuple(path for path in sources("passes") if path.name != "__init__.py")


def pass_table() -> tuple[Any, ...]:
    """The rules in the order in which they run."""
    return importlib.import_module("normfuse.passes").TABLE


@cache
def modules() -> dict[str, Path]:
    """Import name -> file, of everything that is installed."""
    return {name_of(path): path for folder in ("normfuse", "passes", "models") for path in sources(folder)}


def packages() -> tuple[str, ...]:
    """Import names of the folders that are packages."""
    return tuple(sorted(name for name, path in modules().items() if path.name == "__init__.py"))


def name_of(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((HOMES.get(top, top), *rest)).removesuffix(".__init__")


@dataclass(frozen=True)
class Import:
    """One name that a file imports. `deep`: not while the file is loaded (inside a function, or for types only)."""

    path: Path
    line: int
    target: str
    deep: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"

    def within(self, *prefixes: str) -> bool:
        return any(self.target == prefix or self.target.startswith(prefix + ".") for prefix in prefixes)


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """All imports of a file: statements, and `import_module` or `__import__` of a text."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), path, deep=False))


def _imports(tree: ast.AST, path: Path, *, deep: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        for target in _targets(node, path):
            yield Import(path, getattr(node, "lineno", 0), target, deep)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types_only(node)
        yield from _imports(node, path, deep=deep or inside)


def _targets(node: ast.AST, path: Path) -> tuple[str, ...]:
    match node:
        case ast.Import(names=names):
            return tuple(alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = _absolute(module, level, path)
            return tuple(f"{base}.{a.name}" if f"{base}.{a.name}" in modules() else base for a in names)
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            return (name,) if called in ("import_module", "__import__") else ()
    return ()


def _absolute(module: str | None, level: int, path: Path) -> str:
    if level == 0:
        return module or ""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    base = ".".join(package.split(".")[: len(package.split(".")) - level + 1])
    return f"{base}.{module}" if module else base


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@dataclass(frozen=True)
class PassDoc:
    """The docstring of a pass, taken apart at its headings."""

    stem: str
    formula: str
    sections: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> PassDoc:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first, *lines = doc.splitlines() or [""]
        stem, _, formula = first.partition(":")
        sections: dict[str, str] = {}
        for line in lines:
            heading, colon, text = line.partition(":")
            if colon and heading in HEADINGS:
                sections[heading] = text.strip()
            elif sections and line.strip():
                last = next(reversed(sections))
                sections[last] = f"{sections[last]} {line.strip()}"
        return cls(stem, formula.strip(), sections)
