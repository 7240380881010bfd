"""Specimens: small plain-torch models, one family per file, their norms spelled in many ways.

Each file has a frozen `Config`, a dict `CONFIGS` with "small" and at least one published size,
`build(config, seed=)` and `example(config, batch=, seed=)`. Every parameter and running statistic is random
and away from its default.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

__all__ = ["load", "names"]


def names() -> tuple[str, ...]:
    """The specimens, in alphabetical order."""
    return tuple(sorted(info.name for info in iter_modules(__path__) if not info.name.startswith("_")))


def load(name: str) -> ModuleType:
    """The file of one specimen, imported when asked for: `load("gpt").build("gpt2-124m")`."""
    if name not in names():
        near = get_close_matches(name, names(), cutoff=0.5)
        raise ValueError(
            f"no specimen {name!r}; "
            + (f"near: {', '.join(near)}" if near else f"there are: {', '.join(names())}")
        )
    return import_module(f"{__name__}.{name}")
