"""torch's own operators for the modules of the corpora; where torch has none, the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .corpus import Reference


def layer_norm(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], m.weight, m.bias, m.eps)


def layer_norm_one_plus(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], 1 + m.weight, m.bias, m.eps)


def rms_norm(m: Any, x: Tensor) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], getattr(m, "weight", None), m.eps)
    return y if getattr(m, "bias", None) is None else y + m.bias


def rms_norm_one_plus(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], 1 + m.weight, m.eps)


def standardized(m: Any, x: Tensor, *, ddof: int = 0, outside: bool = False) -> Tensor:
    """A LayerNorm that torch's operator cannot say: another divisor, eps added to the root."""
    variance, mean = torch.var_mean(x, -1, correction=ddof, keepdim=True)
    y = (x - mean) / (variance.sqrt() + m.eps if outside else (variance + m.eps).sqrt())
    y = y if m.weight is None else y * m.weight
    return y if m.bias is None else y + m.bias


def l2_norm(m: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=m.eps)


def batch_norm(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)


def group_norm(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, m.groups, m.weight, m.bias, m.eps)


def instance_norm(m: Any, x: Tensor) -> Tensor:
    return F.instance_norm(x, weight=m.weight, bias=m.bias, eps=m.eps)


def on_axis(axis: int, norm: Reference) -> Callable[..., Tensor]:
    """`norm` of the last axis, applied to another."""

    def reference(m: Any, x: Tensor, *rest: Tensor) -> Tensor:
        y = norm(m, x.movedim(axis, -1), *rest)
        assert isinstance(y, Tensor)
        return y.movedim(-1, axis)

    return reference
