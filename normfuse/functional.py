"""The known functions as functions: `rms_norm(x, weight, eps=1e-6, axis=-1)`, one for each operator, by its stem.

They are derived from the records in `ops`: the same reference that passes, verification and lowering use.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from normfuse.ops import operators
from normfuse.ops.derive import derive, is_callable


def __getattr__(name: str) -> Callable[..., Tensor]:
    record = next((r for r in operators() if r.stem == name and is_callable(r)), None)
    if record is None:
        raise AttributeError(f"module 'normfuse.functional' has no function {name!r}: it has {', '.join(__dir__())}")
    return derive(record)


def __dir__() -> list[str]:
    return sorted({record.stem for record in operators() if is_callable(record)})
