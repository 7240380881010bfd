"""Operators of the ONNX form: one for each ONNX operator that is printed as a whole, with a reference in torch.

They exist only inside `write_onnx`. The exporter decomposes what it does not know; these it leaves in one piece, and
`translations` prints them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from normfuse.ops import operator_named

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


def _instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return functional.instance_norm(x, weight=weight, bias=bias, eps=eps)


INSTANCE_NORM = _define(
    "instance_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _instance_norm, _like_first
)


def _function(x: Tensor, stem: str, axes: list[int], eps: float, options: str) -> Tensor:
    record = operator_named(stem)
    assert record.reference is not None
    return record.reference(x, axes, **({record.eps: eps} if record.eps else {}), **json.loads(options))


FUNCTION = _define("function(Tensor x, str stem, int[] axes, float eps, str options) -> Tensor", _function, _like_first)
"""What ONNX has no operator for, without gain and shift: a function in the file. `options` is JSON."""


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_heads: int, kv_heads: int, causal: bool, scale: float
) -> Tensor:
    flat = q.dim() == 3
    given = ((q, q_heads), (k, kv_heads), (v, kv_heads))
    heads = [t.unflatten(2, (n, -1)).transpose(1, 2) if flat else t for t, n in given]
    y = functional.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q_heads != kv_heads
    )
    return y.transpose(1, 2).flatten(2) if flat else y


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_heads: int, kv_heads: int, causal: bool, scale: float
) -> Tensor:
    if q.dim() == 4:
        return q.new_empty((*q.shape[:3], v.shape[3]))
    return q.new_empty((q.shape[0], q.shape[1], q_heads * (v.shape[2] // kv_heads)))


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _gemm_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


ATTENTION = _define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int q_heads, int kv_heads, bool causal, float scale) -> Tensor",
    _attention,
    _attention_fake,
)
"""Heads (batch, heads, length, width), or side by side (batch, length, heads * width)."""


def _scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return x @ y * scale


SCALED_PRODUCT = _define(
    "scaled_product(Tensor x, Tensor y, float scale) -> Tensor", _scaled_product, lambda x, y, scale: x @ y
)
"""Matrix product times a number, one operator of onnxruntime's own."""


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


BIAS_GELU = _define("bias_gelu(Tensor x, Tensor bias) -> Tensor", _bias_gelu, _like_first)
"""gelu(x + bias) with the error function, one pass over memory in onnxruntime."""

GEMM = _define("gemm(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _gemm, _gemm_fake)


def _reshape(x: Tensor, sizes: list[int]) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


def _reshape_fake(x: Tensor, sizes: list[int]) -> Tensor:
    known = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    if -1 in sizes:
        rest = math.prod(s for s, size in zip(known, sizes, strict=True) if size != -1)
        known[sizes.index(-1)] = x.numel() // rest
    return x.new_empty(known)


RESHAPE = _define("reshape(Tensor x, int[] sizes) -> Tensor", _reshape, _reshape_fake)
"""Sizes as ONNX has them: 0 is the input's own at that place, -1 what is left."""


def _sum(x: Tensor, y: Tensor) -> Tensor:
    return x + y


SUM = _define("sum(Tensor x, Tensor y) -> Tensor", _sum, _like_first)
"""Add of two tensors of one shape, by the name that no matcher looks for."""


def _pad(x: Tensor, pads: list[int]) -> Tensor:
    return functional.pad(x, pads)


PAD = _define("pad(Tensor x, int[] pads) -> Tensor", _pad, _pad)
"""Padding by 0, the last axis first, with the axes named in the node."""


def _spread(x: Tensor, sides: list[int]) -> Tensor:
    return x.expand(*x.shape[:2], *sides).contiguous()


SPREAD = _define(
    "spread(Tensor x, int[] sides) -> Tensor", _spread, lambda x, sides: x.new_empty((*x.shape[:2], *sides))
)
"""(batch, channels, 1, 1) repeated over an image, by the operator that keeps onnxruntime's blocked layout."""

GLOBAL_AVERAGE_POOL = _define(
    "global_average_pool(Tensor x) -> Tensor",
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: x.new_empty((*x.shape[:2], 1, 1)),
)


def _grouped_mm(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    y, start = _grouped_mm_fake(x, weights, ends).zero_(), 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        y[start:end], start = x[start:end] @ weight, end
    return y


def _grouped_mm_fake(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[1]))


GROUPED_MM = _define("grouped_mm(Tensor x, Tensor[] weights, Tensor ends) -> Tensor", _grouped_mm, _grouped_mm_fake)
"""Rows sorted by expert, each times its expert's matrix; `ends` is where the rows of each expert end."""


def _fourier(x: Tensor, axes: list[int], imaginary: bool) -> Tensor:
    y = torch.fft.fftn(x.double(), dim=axes)
    return (y.imag if imaginary else y.real).to(x.dtype)


FOURIER = _define(
    "fourier(Tensor x, int[] axes, bool imaginary) -> Tensor", _fourier, lambda x, axes, imaginary: torch.empty_like(x)
)
"""One part of the discrete Fourier transform over these axes, computed in float64."""
