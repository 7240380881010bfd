"""MODEL on the command line: `package.module:callable`, a `.pt2` file, or the name of a specimen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from normfuse.errors import CaptureError, NormfuseError


@dataclass(frozen=True)
class Loaded:
    """A model and its example inputs."""

    name: str
    model: nn.Module | ExportedProgram
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def find(text: str) -> Loaded:
    """Load what MODEL names. Raises `NormfuseError` in one line if there is no such thing."""
    if text.endswith(".pt2"):
        return _archive(text)
    if ":" in text:
        return _callable(text)
    return _specimen(text)


def _archive(text: str) -> Loaded:
    from normfuse.optimized.archive import load_exported

    exported, _ = load_exported(Path(text))
    args, kwargs = exported.example_inputs or ((), {})
    return Loaded(Path(text).stem, exported, tuple(args), kwargs)


def _callable(text: str) -> Loaded:
    module_name, _, attribute = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise NormfuseError(f"cannot import {module_name!r}: {error}") from None
    except AttributeError:
        raise NormfuseError(f"module {module_name!r} has no {attribute!r}") from None
    if not callable(build):
        raise NormfuseError(f"{text} is not callable: it must return (module, args) or (module, args, kwargs)")
    made = build()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise CaptureError(f"{text}() must return (module, args) or (module, args, kwargs), not {type(made).__name__}")
    return Loaded(text, made[0], tuple(made[1]), made[2] if len(made) == 3 else {})


def _specimen(text: str) -> Loaded:
    from normfuse import models

    name, _, config = text.partition("@")
    try:
        family = models.load(name)
    except (KeyError, ValueError) as error:
        known = ", ".join(models.names())
        raise NormfuseError(
            f"{text!r} is no model: give package.module:callable, a .pt2 file, or a specimen ({known})"
        ) from error
    config = config or "small"
    if config not in family.CONFIGS:
        raise NormfuseError(f"specimen {name!r} has no config {config!r}: it has {', '.join(family.CONFIGS)}")
    args, kwargs = family.example(config)
    return Loaded(text, family.build(config), args, kwargs)
