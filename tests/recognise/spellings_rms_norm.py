"""RMSNorm over the last axis as the language models write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import references
from .corpus import WIDTH, Affine, Outputs, Spelling, gain, named, rows


def rms_norm(make: Callable[[], nn.Module], **given: Any) -> Spelling:
    """A record over the last axis, with what the class itself says of eps and parameters."""
    said: dict[str, Any] = dict(axes=(-1,), eps=make.eps, affine=make.affine)  # type: ignore[attr-defined]
    said |= dict(reference=references.rms_norm, inputs=lambda: (rows(2, 5, WIDTH),))
    return Spelling(kind="rms_norm", name="rms_norm_" + named(make), make=make, **(said | given))


class Gain(Affine):
    """A gain alone: most RMSNorms."""

    affine = "weight"
    eps = 1e-6


# -- torch's own ---------------------------------------------------------------------------------------------


class Module(nn.Module):
    eps, affine = 1e-5, "weight"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ModuleDefaultEps(nn.Module):
    """eps=None: the machine epsilon of the dtype."""

    eps, affine = torch.finfo(torch.float32).eps, "weight"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ModdedNanoGpt(nn.Module):
    """No parameters, no eps given."""

    eps, affine = torch.finfo(torch.float32).eps, "none"

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class Functional(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, [WIDTH], self.weight, self.eps)


class UpcastFunctional(Gain):
    """torchtitan and others in bfloat16: normalised in float32, cast, then the gain."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (WIDTH,), eps=self.eps).type_as(x) * self.weight


# -- as published with models --------------------------------------------------------------------------------


class Llama(Gain):
    """transformers, 138 copies: cast back before the gain."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.weight * hidden_states.to(input_dtype)


class LlamaFloat32(Llama):
    """The same class in a float32 model: both casts are no-ops."""


class Olmo2(Gain):
    """The gain before the cast back."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return (self.weight * hidden_states).to(input_dtype)


class Gemma(Gain):
    """(1 + w) in float32."""

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class Gemma3n(Gain):
    """torch.pow(mean_squared, -0.5), for the sake of JAX's rounding."""

    def forward(self, x: Tensor) -> Tensor:
        mean_squared = x.float().pow(2).mean(-1, keepdim=True) + self.eps
        normed = x.float() * torch.pow(mean_squared, -0.5)
        return (normed * self.weight.float()).type_as(x)


class T5(Gain):
    """The variance alone in float32; a float32 gain casts nothing back."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.weight * hidden_states


class CpmAnt(Gain):
    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
        return (hidden_states * torch.rsqrt(variance + self.eps)).to(hidden_states.dtype) * self.weight


class DeepSeek(nn.Module):
    """The factor alone in float32, no gain."""

    eps, affine = 1e-6, "none"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class Reformer(nn.Module):
    """len_norm."""

    eps, affine = 1e-6, "none"

    def forward(self, x: Tensor) -> Tensor:
        variance = torch.mean(x**2, -1, keepdim=True)
        return x * torch.rsqrt(variance + self.eps)


class GainFirst(Gain):
    """weight * x, then the factor."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean_square + self.eps)


class GainIntoFactor(Gain):
    """x * (weight * factor), as the kernels of mamba_ssm spell it."""

    def forward(self, x: Tensor) -> Tensor:
        rstd = 1 / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * (rstd * self.weight)


class Original(Affine):
    """Zhang and Sennrich's repository: the norm over sqrt(d), eps outside, an offset."""

    eps = 1e-8

    def forward(self, x: Tensor) -> Tensor:
        norm_x = x.norm(2, dim=-1, keepdim=True)
        rms_x = norm_x * WIDTH ** (-1.0 / 2)
        return self.weight * (x / (rms_x + self.eps)) + self.bias


class XTransformers(Gain):
    """lucidrains before F.normalize: the root kept above eps."""

    eps = 1e-8

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.norm(x, dim=-1, keepdim=True) * WIDTH**-0.5
        return x / norm.clamp(min=self.eps) * self.weight


class XLstm(Affine):
    """A bias as well."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight + self.bias


class FlaxT5X(nn.Module):
    """T5X's layer norm ported: lax.rsqrt, scale."""

    eps, affine = 1e-6, "weight"

    def __init__(self) -> None:
        super().__init__()
        self.scale = gain(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mean2 = torch.mean(torch.square(x), dim=-1, keepdim=True)
        y = torch.mul(x, torch.rsqrt(torch.add(mean2, self.eps)))
        return torch.einsum("...c,c->...c", y, self.scale)


# -- gates, adaptive gains, residuals ------------------------------------------------------------------------


class GatedBefore(Gain):
    """Mamba2: the product is normalised."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x * F.silu(gate)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class GatedAfter(Gain):
    """Qwen3-Next: the norm is gated, in float32."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        h = self.weight * h.to(x.dtype)
        return (h * F.silu(gate.to(torch.float32))).to(x.dtype)


class AdaptiveRms(nn.Module):
    """pi0's Gemma: scale and shift from a condition."""

    eps, affine = 1e-6, "none"

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(7, 2 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, offset = self.dense(condition).unsqueeze(1).chunk(2, dim=-1)
        normed = x * torch.rsqrt(torch.mean(torch.square(x), dim=-1, keepdim=True) + self.eps)
        return normed * (1 + scale) + offset


class FusedAdd(Gain):
    """vLLM's native path: residual added first and returned."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x.to(torch.float32) + residual.to(torch.float32)
        residual = h.to(x.dtype)
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight, residual


class Grouped(Gain):
    """Bamba, Zamba2: groups of the last axis by themselves, one gain over all."""

    def forward(self, x: Tensor) -> Tensor:
        *prefix, last = x.shape
        h = x.view(*prefix, 4, last // 4)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.view(*prefix, last)


class LogExp(Gain):
    """x * exp(-log(mean square) / 2)."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(-0.5 * torch.log(x.pow(2).mean(-1, keepdim=True) + self.eps)) * self.weight


class VarianceAndMean(Gain):
    """E[x^2] as variance plus squared mean."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
        return x / torch.sqrt(var + mean**2 + self.eps) * self.weight


def _module(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), m.norm.weight, m.norm.eps)


def _machine_eps(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,))


def _original(m: Any, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + m.eps) * m.weight + m.bias


def _clamped(m: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=m.eps * math.sqrt(WIDTH)) * math.sqrt(WIDTH) * m.weight


def _scale(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), m.scale, m.eps)


def _gated_before(m: Any, x: Tensor, gate: Tensor) -> Tensor:
    return references.rms_norm(m, x * F.silu(gate))


def _gated_after(m: Any, x: Tensor, gate: Tensor) -> Tensor:
    return references.rms_norm(m, x) * F.silu(gate)


def _adaptive(m: Any, x: Tensor, condition: Tensor) -> Tensor:
    scale, offset = m.dense(condition)[:, None].chunk(2, -1)
    return F.rms_norm(x, (WIDTH,), eps=m.eps) * (1 + scale) + offset


def _fused_add(m: Any, x: Tensor, residual: Tensor) -> Outputs:
    return references.rms_norm(m, x + residual), x + residual


def _grouped(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x.unflatten(-1, (4, -1)), (WIDTH // 4,), eps=m.eps).flatten(-2) * m.weight


def _two() -> tuple[Tensor, ...]:
    return rows(2, 5, WIDTH), rows(2, 5, WIDTH)


SPELLINGS: tuple[Spelling, ...] = (
    rms_norm(Module, reference=_module),
    rms_norm(ModuleDefaultEps, reference=_module),
    rms_norm(ModdedNanoGpt, reference=_machine_eps),
    rms_norm(Functional),
    rms_norm(UpcastFunctional, dtype=torch.bfloat16),
    rms_norm(Llama, dtype=torch.bfloat16),
    rms_norm(LlamaFloat32),
    rms_norm(Olmo2, dtype=torch.float16),
    rms_norm(Gemma, dtype=torch.bfloat16, reference=references.rms_norm_one_plus),
    rms_norm(Gemma3n, dtype=torch.bfloat16),
    rms_norm(T5, dtype=torch.bfloat16, weights=torch.float32),
    rms_norm(CpmAnt, dtype=torch.float16),
    rms_norm(DeepSeek, dtype=torch.bfloat16),
    rms_norm(Reformer),
    rms_norm(GainFirst),
    rms_norm(GainIntoFactor),
    rms_norm(Original, reference=_original, eps_place="outside"),
    rms_norm(XTransformers, reference=_clamped, eps_place="clamp"),
    rms_norm(XLstm, dtype=torch.bfloat16),
    rms_norm(FlaxT5X, reference=_scale),
    rms_norm(GatedBefore, reference=_gated_before, inputs=_two),
    rms_norm(GatedAfter, reference=_gated_after, inputs=_two, dtype=torch.bfloat16),
    rms_norm(
        AdaptiveRms,
        adaptive=True,
        reference=_adaptive,
        inputs=lambda: (rows(2, 5, WIDTH), torch.randn(2, 7)),
    ),
    rms_norm(FusedAdd, reference=_fused_add, inputs=_two, scaled=(0, 1), dtype=torch.bfloat16),
    rms_norm(Grouped, or_affine=("none",), reference=_grouped),
    rms_norm(LogExp),
    rms_norm(VarianceAndMean),
)
