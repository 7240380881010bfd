"""What each row function computes, over matrices: rows along the first axis, statistics along the last.

Each is a plain function in aten operators: what runs on the CPU, what its kernels are generated from and what its
gradients are derived from. `weight` and `bias` are (1, columns) or like `x`; other parameters broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normfuse.lower.triton.region import THRESHOLD

LOG2_E = math.log2(math.e)
LN_2 = (0.6875, 0.005645751953125, 1.42860682030941723212e-6)  # the first two have few bits: their products are exact


def wide(x: Tensor) -> Tensor:
    """Statistics of half precision are taken in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def total(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    """x less its mean. The mean of what is left is the rounding of the first, which far from zero is all the error."""
    near = x - mean(x)
    return near - mean(near)


def largest(x: Tensor) -> Tensor:
    """The stabiliser of an exponential: results do not depend on it, so no gradient goes through it."""
    return x.amax(-1, keepdim=True).detach()


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, cast: str) -> Tensor:
    values = wide(x)
    y = values * torch.rsqrt(mean(values.square()) + eps)
    return affine(y.to(x.dtype) if cast == "first" else y, weight, bias).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float) -> Tensor:
    values = wide(x)
    apart = centred(values)
    return affine(apart * torch.rsqrt(mean(apart.square()) + eps), weight, bias).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, cast: str
) -> tuple[Tensor, Tensor]:
    added = (wide(x) + wide(residual)).to(x.dtype)
    return rms_norm(added, weight, bias, eps=eps, cast=cast), added


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    added = (wide(x) + wide(residual)).to(x.dtype)
    return layer_norm(added, weight, bias, eps=eps), added


def carried_rms_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, cast: str
) -> tuple[Tensor, Tensor]:
    """The sum that is there already, which both terms have their gradient from."""
    return rms_norm(x, weight, bias, eps=eps, cast=cast), x


def carried_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps=eps), x


def crms_norm(x: Tensor, *, eps: float) -> Tensor:
    values = wide(x)
    squares = total(values.square()) + total(values).square()
    return (values * torch.rsqrt(squares / (x.shape[-1] + 1) + eps)).to(x.dtype)


def l2_norm(x: Tensor, *, eps: float) -> Tensor:
    """The clamp stands before the root, where its gradient at zero is finite."""
    values = wide(x)
    return (values * torch.rsqrt(total(values.square()).clamp_min(eps * eps))).to(x.dtype)


def scale_norm(x: Tensor, gain: Tensor, *, eps: float) -> Tensor:
    values = wide(x)
    return (values * torch.rsqrt(total(values.square()).clamp_min(eps * eps)) * gain).to(x.dtype)


def dyt(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return affine(torch.tanh(wide(alpha) * wide(x)), weight, bias).to(x.dtype)


def derf(x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return affine(torch.erf(wide(alpha) * wide(x) + wide(shift)), weight, bias).to(x.dtype)


def dyisru(x: Tensor, beta: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, scale: float) -> Tensor:
    values = wide(x)
    return affine(values * torch.rsqrt(values.square() + wide(beta)) * scale, weight, bias).to(x.dtype)


def seed_norm(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, *, eps: float) -> Tensor:
    values = wide(x)
    gate = torch.tanh(total(values * wide(beta))) * wide(alpha) + wide(weight)
    return (gate * (values * torch.rsqrt(mean(values.square()) + eps))).to(x.dtype)


def seed_norm_gated(x: Tensor, weight: Tensor, alpha: Tensor, gate: Tensor, *, eps: float) -> Tensor:
    """SeeDNorm with several heads: the gate of each head is given at its columns."""
    values = wide(x)
    gain = wide(gate) * wide(alpha) + wide(weight)
    return (gain * (values * torch.rsqrt(mean(values.square()) + eps))).to(x.dtype)


def evo_norm_s0(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, *, eps: float) -> Tensor:
    values = wide(x)
    apart = centred(values)
    swish = values * torch.sigmoid(wide(v) * values)
    return (swish * torch.rsqrt(mean(apart.square()) + eps) * weight + bias).to(x.dtype)


def softmax(x: Tensor) -> Tensor:
    values = wide(x)
    e = torch.exp(values - largest(values))
    return (e / total(e)).to(x.dtype)


def softmax_two_pass(x: Tensor) -> Tensor:
    """exp(x) = p * 2**n with |log2(p)| <= 1/2; the sum is kept as such a pair too (Dukhan & Ablavatski 2020).

    Rescaling is by powers of two, which do not round. Sound for |x| up to 4e4, where n times the parts of ln 2 is exact.
    """
    values = wide(x)
    n = torch.floor(values * LOG2_E + 0.5)
    rest = values - n * LN_2[0] - n * LN_2[1] - n * LN_2[2]
    rest = torch.where(rest.abs() < 1.0, rest, 0.0)  # nan where x is infinite: there 2**n says all
    p = rest * 0.0 + 1.0
    for order in range(13 if values.dtype == torch.float64 else 7, 0, -1):
        p = p * rest * (1.0 / order) + 1.0
    e = p * torch.exp2(n - largest(n))
    return (e / total(e)).to(x.dtype)


def log_softmax(x: Tensor) -> Tensor:
    values = wide(x)
    shifted = values - largest(values)
    return (shifted - torch.log(total(torch.exp(shifted)))).to(x.dtype)


def softmax_with_sink(x: Tensor, sink: Tensor) -> Tensor:
    values, extra = wide(x), wide(sink)
    highest = torch.maximum(largest(values), extra.detach())
    e = torch.exp(values - highest)
    return (e / (total(e) + torch.exp(extra - highest))).to(x.dtype)


def sparsemax(x: Tensor) -> Tensor:
    z = wide(x) - largest(wide(x))
    return (z - THRESHOLD(z, 1.0)).clamp_min(0.0).to(x.dtype)


def entmax15(x: Tensor) -> Tensor:
    z = (wide(x) - largest(wide(x))) * 0.5
    return (z - THRESHOLD(z, 2.0)).clamp_min(0.0).square().to(x.dtype)


def stablemax(x: Tensor) -> Tensor:
    values = wide(x)
    s = torch.where(values >= 0.0, values + 1.0, 1.0 / (1.0 - torch.where(values >= 0.0, 0.0, values)))
    return (s / total(s)).to(x.dtype)


def standardize_weight(w: Tensor, gain: Tensor | None = None, *, eps: float, correction: int, place: str) -> Tensor:
    values = wide(w)
    apart = centred(values)
    variance = total(apart.square()) / (w.shape[-1] - correction)
    y = apart * torch.rsqrt(variance + eps) if place == "inside" else apart / (torch.sqrt(variance) + eps)
    return (y if gain is None else y * gain).to(w.dtype)
