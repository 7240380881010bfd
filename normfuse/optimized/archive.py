"""`.pt2` archives: what `Optimized.save` writes and `normfuse.load` reads."""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoweringError, NormfuseError
from normfuse.files import write_beside
from normfuse.graph.conditions import Condition
from normfuse.graph.program import Program
from normfuse.graph.signature import Leaf, Signature
from normfuse.lower.exported import to_exported
from normfuse.lower.torch import plain
from normfuse.rewrite.record import FiringKey

_REPORT = "normfuse.json"


def save(
    program: Program,
    tensors: Mapping[str, Tensor],
    report: Mapping[str, Any],
    backend: str,
    path: Path,
    excluded: frozenset[FiringKey] = frozenset(),
) -> None:
    """Write the archive beside `path` and rename it, `tensors` in the place of the program's own.

    Raises `LoweringError` if the place cannot be written.
    """
    exported = to_exported(plain(program, excluded))
    exported.state_dict.update({n: t for n, t in tensors.items() if n in exported.state_dict})
    saved = {
        "report": report,
        "backend": backend,
        "parameters": _parameters(program.signature.parameters),
        "conditions": _conditions(program.signature),
    }
    extra = {_REPORT: json.dumps(saved, default=str)}
    target = path if path.suffix else path.with_suffix(".pt2")
    with write_beside(target, LoweringError) as beside, beside.open("wb") as file:
        torch.export.save(exported, file, extra_files=extra)


def _parameters(signature: inspect.Signature | None) -> list[list[Any]] | None:
    """Names and kinds of the call's parameters; defaults that JSON cannot hold become None."""
    if signature is None:
        return None
    plain = (bool, int, float, str, type(None))
    return [
        [p.name, int(p.kind), p.default is not p.empty, p.default if isinstance(p.default, plain) else None]
        for p in signature.parameters.values()
    ]


def _conditions(signature: Signature) -> list[list[Any]]:
    """Text, place in the model, and for each size that the text names an input and an axis that have it."""
    sizes = {size: [i, j] for i, leaf in enumerate(signature.leaves) for j, size in enumerate(leaf.sizes)}
    return [[c.text, c.where, {name: sizes[name] for name in sorted(c.names)}] for c in signature.conditions]


def conditions_of(saved: list[list[Any]], leaves: tuple[Leaf, ...]) -> tuple[Condition, ...]:
    """Conditions as `save` described them, over the sizes' names in a program that was loaded."""

    def now(places: dict[str, list[int]]) -> dict[str, str]:
        return {name: str(leaves[i].sizes[j]) for name, (i, j) in places.items()}

    return tuple(Condition(Condition(text).told(now(places)), where) for text, where, places in saved)


def signature_of(saved: list[list[Any]] | None) -> inspect.Signature | None:
    """The call's parameters as `save` described them."""
    if saved is None:
        return None
    return inspect.Signature(
        [
            inspect.Parameter(
                name, inspect._ParameterKind(kind), default=default if has_default else inspect.Parameter.empty
            )
            for name, kind, has_default, default in saved
        ]
    )


def load_exported(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The ExportedProgram in a `.pt2` file and what normfuse wrote beside it, if it did.

    Raises `NormfuseError` in one line for a missing file and for one that is not a `.pt2` archive.
    """
    if not path.is_file():
        raise NormfuseError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise NormfuseError(f"{path} is not a .pt2 archive (or is cut short): write one with Optimized.save")
    extra = {_REPORT: ""}
    try:
        with path.open("rb") as file:
            exported = torch.export.load(file, extra_files=extra)
    except Exception as error:
        raise NormfuseError(f"{path} cannot be read as a .pt2 archive: {str(error).splitlines()[0]:.200}") from error
    text = extra[_REPORT]
    text = text.decode() if isinstance(text, bytes) else text
    return exported, json.loads(text) if text else {}
