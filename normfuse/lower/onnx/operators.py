"""Operators of the ONNX form: one for each ONNX operator that is printed as a whole, with a reference in torch.

They exist only inside `write_onnx`. The exporter decomposes what it does not know; these it leaves in one piece, and
`translations` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_library = torch.library.Library("normfuse_onnx", "DEF")


def _define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normfuse_onnx::{name}", fake, lib=_library)
    return getattr(torch.ops.normfuse_onnx, name)


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[axis:], weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, axis: int, eps: float) -> Tensor:
    return functional.rms_norm(x, x.shape[axis:], weight, eps)


LAYER_NORM = _define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, int axis, float eps) -> Tensor", _layer_norm, _like_first
)
RMS_NORM = _define("rms_norm(Tensor x, Tensor weight, int axis, float eps) -> Tensor", _rms_norm, _like_first)
