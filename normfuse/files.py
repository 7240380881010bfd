"""Files are written beside their place and then renamed: what was there before is whole until the new one is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from normfuse.errors import NormfuseError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def write_beside(target: Path, error: type[NormfuseError]) -> Generator[Path]:
    """A temporary path in the target's folder that becomes the target if the block ends well. Folders are made.

    Raises `error` if the place cannot be written; then nothing half-written is left.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
    except OSError as problem:
        raise error(f"cannot write {target}: {problem.strerror or problem}") from None
    beside = Path(name)
    try:
        yield beside
        beside.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        beside.replace(target)
    except OSError as problem:
        raise error(f"cannot write {target}: {problem.strerror or problem}") from None
    finally:
        beside.unlink(missing_ok=True)
