"""What stands in for a norm (DyT, Derf) and the activations whose spellings stand in the way of a fusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import WIDTH, Affine, Spelling, Stateless, gain, named, rows, shift

# -- DyT -----------------------------------------------------------------------------------------------------


class Dynamic(Affine):
    """A scalar alpha besides the gain and the shift."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.37]))


class DynamicTanh(Dynamic):
    """Zhu et al."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.alpha * x)
        return x * self.weight + self.bias


class DynamicTanhChannelsFirst(Dynamic):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.alpha * x)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class DynamicTanhFused(Dynamic):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, F.tanh(x.mul(self.alpha)))


class DynamicTanhWithoutBias(Dynamic):
    """Language models: no shift; float32 inside."""

    affine = "weight"

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha.float() * x.float()).to(x.dtype)


class DynamicTanhBySigmoid(Dynamic):
    """tanh(z) = 2 sigmoid(2 z) - 1."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * torch.sigmoid(2 * self.alpha * x) - 1) * self.weight + self.bias


class DynamicTanhExponentials(Dynamic):
    def forward(self, x: Tensor) -> Tensor:
        e = torch.exp(-2 * self.alpha * x)
        return (1 - e) / (1 + e) * self.weight + self.bias


class Derf(Dynamic):
    """gamma erf(alpha x + s) + beta."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor([0.21]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.erf(self.alpha * x + self.s) + self.bias


class DerfComplement(Derf):
    """1 - erfc, scalars of rank zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(0.61)), nn.Parameter(torch.tensor(-0.15))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, 1 - torch.erfc(x * self.scale + self.offset), self.weight)


class DerfChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))
        self.gamma, self.beta = gain(WIDTH, 1, 1), shift(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * torch.special.erf(torch.add(self.a * x, self.s)) + self.beta


# -- GELU ----------------------------------------------------------------------------------------------------


def functional_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def megatron_erf_gelu(x: Tensor) -> Tensor:
    return (
        x
        * 0.5
        * (torch.erf(x / 1.41421356237309504880).to(dtype=x.dtype) + torch.ones_like(x).to(dtype=x.dtype))
    )


def erfc_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))


def ndtr_gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return x * torch.special.ndtr(x)


def functional_tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gpt2_gelu(x: Tensor) -> Tensor:
    """transformers' NewGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def cubic_gelu(x: Tensor) -> Tensor:
    """x * (1 + 0.044715 x x) inside, as in Megatron's and BLOOM's fused bias GELU."""
    root = math.sqrt(2.0 / math.pi)
    return x * 0.5 * (1 + torch.tanh(root * x * (1 + 0.044715 * x * x)))


def sigmoid_of_cubic_gelu(x: Tensor) -> Tensor:
    """(1 + tanh(z)) / 2 as a sigmoid."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class BiasGelu(nn.Module):
    """The bias of the layer before, added inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = shift(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bias + x
        return x * (0.5 * (1.0 + torch.erf(x * 0.7071067811865475)))


# -- SiLU ----------------------------------------------------------------------------------------------------


def functional_silu(x: Tensor) -> Tensor:
    return F.silu(x)


def x_sigmoid(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def sigmoid_in_place(x: Tensor) -> Tensor:
    """Swish of EfficientNet code."""
    return x.sigmoid().mul_(x)


def logistic(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def half_tanh(x: Tensor) -> Tensor:
    """sigmoid(x) as (1 + tanh(x / 2)) / 2."""
    return 0.5 * x * (1.0 + torch.tanh(0.5 * x))


def gated_unit(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product."""
    return gate * torch.sigmoid(gate) * up


def _dyt(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(m.alpha * x) * m.weight
    return y if m.bias is None else y + m.bias


def _dyt_first(m: Any, x: Tensor) -> Tensor:
    return _dyt(m, x.movedim(1, -1)).movedim(-1, 1)


def _derf(m: Any, x: Tensor) -> Tensor:
    return torch.erf(m.alpha * x + m.s) * m.weight + m.bias


def _derf_complement(m: Any, x: Tensor) -> Tensor:
    return torch.erf(m.scale * x + m.offset) * m.weight + m.bias


def _derf_first(m: Any, x: Tensor) -> Tensor:
    return torch.erf(m.a * x + m.s) * m.gamma + m.beta


def _gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(x)


def _tanh_gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _bias_gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(x + m.bias)


def _silu(m: Any, x: Tensor) -> Tensor:
    return F.silu(x)


def _swiglu(m: Any, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _image() -> tuple[Tensor, ...]:
    return (rows(2, WIDTH, 3, 5),)


def _record(kind: str, make: Callable[[], nn.Module], name: str, **given: Any) -> Spelling:
    said: dict[str, Any] = dict(inputs=lambda: (rows(2, 5, WIDTH),), magnitudes=(1.0, 1e-2, 3.0, 0.0))
    return Spelling(kind=kind, name=name, make=make, **(said | given))


def _dynamic(kind: str, make: type[nn.Module], **given: Any) -> Spelling:
    said: dict[str, Any] = dict(affine=getattr(make, "affine", "weight+bias"))
    said |= dict(reference=_dyt if kind == "dyt" else _derf)
    return _record(kind, make, f"{kind}_{named(make)}", **(said | given))


def _of(kind: str, function: Callable[..., Tensor], **given: Any) -> Spelling:
    said: dict[str, Any] = dict(reference=_gelu if kind == "gelu" else _silu)
    return _record(kind, lambda: Stateless(function), f"{kind}_{named(function)}", **(said | given))


TANH: dict[str, Any] = dict(reference=_tanh_gelu, facts={"approximate": "tanh"})

SPELLINGS: tuple[Spelling, ...] = (
    _dynamic("dyt", DynamicTanh),
    _dynamic("dyt", DynamicTanhChannelsFirst, inputs=_image, reference=_dyt_first),
    _dynamic("dyt", DynamicTanhFused),
    _dynamic("dyt", DynamicTanhWithoutBias, dtype=torch.bfloat16),
    _dynamic("dyt", DynamicTanhBySigmoid),
    _dynamic("dyt", DynamicTanhExponentials, magnitudes=(1.0, 1e-2, 3.0)),
    _dynamic("derf", Derf),
    _dynamic("derf", DerfComplement, reference=_derf_complement),
    _dynamic("derf", DerfChannelsFirst, inputs=_image, reference=_derf_first),
    _of("gelu", functional_gelu),
    _of("gelu", erf_gelu),
    _of("gelu", megatron_erf_gelu),
    _of("gelu", erfc_gelu),
    _of("gelu", ndtr_gelu),
    _of("gelu", functional_tanh_gelu, **TANH),
    _of("gelu", gpt2_gelu, **TANH),
    _of("gelu", cubic_gelu, **TANH),
    _of("gelu", sigmoid_of_cubic_gelu, **TANH),
    _record("gelu", BiasGelu, "gelu_bias_gelu", reference=_bias_gelu),
    _of("silu", functional_silu),
    _of("silu", x_sigmoid),
    _of("silu", sigmoid_in_place),
    _of("silu", logistic),
    _of("silu", half_tanh),
    _of("silu", gated_unit, reference=_swiglu, inputs=lambda: (rows(2, 5, WIDTH), rows(2, 5, WIDTH))),
)
