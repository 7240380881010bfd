"""normfuse: a graph compiler for PyTorch that sees through norms, attention and weight reparameterizations.

    optimized = normfuse.optimize(model, args)
    print(optimized.report)

Everything is loaded when it is first used: `import normfuse` costs what `import torch` costs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normfuse.errors import CaptureError, InputError, LoweringError, NormfuseError, PassError, VerificationError

if TYPE_CHECKING:
    from normfuse.api import carry_adapters, explain, export_onnx, inspect, load, optimize, optimize_, replay, verify
    from normfuse.inventory.inventory import Inventory
    from normfuse.inventory.pattern import Pattern
    from normfuse.optimized.module import Optimized
    from normfuse.report import Report
    from normfuse.rewrite.record import Refusal, RewriteRecord
    from normfuse.verification import Verification
    from normfuse.weights.adapters import Adapter

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "weights.adapters", "carry_adapters": "api",
    "explain": "api", "export_onnx": "api", "inspect": "api", "load": "api", "optimize": "api",
    "optimize_": "api", "replay": "api", "verify": "api", "Optimized": "optimized.module", "Report": "report",
    "Refusal": "rewrite.record", "RewriteRecord": "rewrite.record", "Inventory": "inventory.inventory",
    "Pattern": "inventory.pattern", "Verification": "verification",
}  # fmt: skip

__all__ = [
    "Adapter", "CaptureError", "InputError", "Inventory", "LoweringError", "NormfuseError", "Optimized", "PassError",
    "Pattern", "Refusal", "Report", "RewriteRecord", "Verification", "VerificationError", "carry_adapters", "explain",
    "export_onnx", "inspect", "load", "optimize", "optimize_", "replay", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import sys

        verbs = import_module(f"normfuse.{_HOMES[name]}")
        found = getattr(verbs, name)
        setattr(sys.modules[__name__], name, found)  # a submodule of the same name must not shadow the verb
        return found
    raise AttributeError(f"module 'normfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
