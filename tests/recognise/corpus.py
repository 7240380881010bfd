"""What the corpora are made of: two records, seeded parameters, inputs nothing has standardised, the oracle.

A corpus knows nothing of the engine. A `Spelling` says what a module computes and which torch operator
computes the same; a `NearMiss` says what a module only looks like. Both are built anew at every call, the
same each time.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Outputs = Tensor | tuple[Tensor, ...]
Reference = Callable[..., Outputs]  # (module, *args), all in float64
LOW = (torch.float16, torch.bfloat16, torch.float32)

# operators that recognition raises and the inventory of API.md does not list
OPERATORS = frozenset({"gelu", "silu", "logsumexp", "log_softmax"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module as people write it, and inputs for it: one seed for both, taken from the name."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    dtype: torch.dtype = torch.float32  # of the model and of its floating inputs
    weights: torch.dtype | None = None  # where parameters are kept in another dtype than the inputs

    def build(self) -> nn.Module:
        """The module in eval mode, its parameters and statistics drawn at random."""
        with _seeded(self.name):
            module = _settled(self.make().eval())
        return module.to(self.weights or self.dtype)

    def example(self, draw: int = 0) -> tuple[Tensor, ...]:
        with _seeded(self.name + " inputs" + str(draw or "")):
            return tuple(a.to(self.dtype) if a.is_floating_point() else a for a in self.inputs())


@dataclass(frozen=True, kw_only=True)
class Spelling(Case):
    """`count` times `kind` (or one of `or_kinds`, where two kinds are the same function), plus `also`.

    or_count    another count that is as right: statistics that two readers share
    axes        negative, of the tensor that the reduction reads
    outer_axes  the same axes seen from the first input, where transposes or views stand round the norm and
                may have been absorbed
    eps         0.0 says that there is none; None that it does not apply
    eps_place   "inside" the root, "outside" of it, "clamp" (the root is kept above eps), "clamp_inside" (what
                stands under the root is)
    affine      "none", "weight", "bias" or "weight+bias": parameters of the model, as the norm applies them
    or_affine   other answers that are as right: a gain along other axes than the norm's, or a scalar, outside
    adaptive    a gain or shift that depends on an input: in the pattern or left behind it, both are right
    facts       what else must hold of the raised operator: scale, mask or groups of an attention, ...
    """

    kind: str
    reference: Reference
    count: int = 1
    or_count: int | None = None
    or_kinds: tuple[str, ...] = ()
    also: Mapping[str, int] = field(default_factory=dict)
    axes: tuple[int, ...] | None = None
    outer_axes: tuple[int, ...] | None = None
    eps: float | None = None
    eps_place: str = "inside"
    ddof: int = 0
    affine: str = "none"
    or_affine: tuple[str, ...] = ()
    adaptive: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)
    scaled: tuple[int, ...] = (0,)  # the inputs that are tried at other magnitudes
    magnitudes: tuple[float, ...] = (1.0, 1e-3, 1e3, 0.0)


@dataclass(frozen=True, kw_only=True)
class NearMiss(Case):
    """A function that none of the `forbidden` kinds computes. Its outputs must be the same after raising.

    forbidden   kinds that may not be counted (others may: a softmax in what is no attention stays a softmax)
    torch_ops   torch operators that may not stand in the raised graph, where our own may say it exactly
    poses_as    what a careless matcher would take it for, in float64; the tests prove that it is not that
    random      the module draws at random: outputs can be compared under one seed only
    training    the module runs in training mode
    """

    why: str
    forbidden: frozenset[str]
    torch_ops: tuple[str, ...] = ()
    poses_as: Reference | None = None
    random: bool = False
    training: bool = False

    def build(self) -> nn.Module:
        return super().build().train(self.training)


def named(make: Callable[..., object]) -> str:
    """The record's name: that of its class or function, in snake_case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", make.__name__.lstrip("_")).lower()


# -- modules and inputs --------------------------------------------------------------------------------------


class Stateless(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Outputs]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Outputs:
        return self.function(*args)


WIDTH = 16  # its reciprocal and its root are exact in every dtype


class Affine(nn.Module):
    """The parameters of a norm over `width` channels: what `affine` says, never at their defaults."""

    weight: nn.Parameter
    bias: nn.Parameter
    width: int = WIDTH
    eps: float = 1e-5
    affine: str = "weight+bias"

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", gain(self.width) if "weight" in self.affine else None)
        self.register_parameter("bias", shift(self.width) if "bias" in self.affine else None)


def gain(*shape: int) -> nn.Parameter:
    """Round 1, both signs possible."""
    return nn.Parameter(1 + 0.5 * torch.randn(shape))


def shift(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.7 * torch.randn(shape))


def rows(*shape: int) -> Tensor:
    """Each row with its own mean and its own scale between 0.1 and 10, each channel with its own offset."""
    lead = (*shape[:-1], 1)
    scale = 10 ** (2 * torch.rand(lead) - 1)
    return (torch.randn(shape) + torch.randn(shape[-1])) * scale + 2 * torch.randn(lead)


def _settled(module: nn.Module) -> nn.Module:
    """What torch initialises to ones and zeros, redrawn."""
    for part in module.modules():
        if isinstance(part, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            _redraw(part)
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_bias is not None:
            part.in_proj_bias.data.normal_(std=0.3)
            part.out_proj.bias.data.normal_(std=0.3)
    for name, parameter in module.named_parameters():
        if name.endswith(("weight_g", "weight.original0")):
            parameter.data.mul_(0.5 + torch.rand(parameter.shape))
    return module


def _redraw(norm: Any) -> None:
    if getattr(norm, "weight", None) is not None:
        norm.weight.data.copy_(gain(*norm.weight.shape))
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.copy_(shift(*norm.bias.shape))
    if getattr(norm, "running_var", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2.5)


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


# -- the oracle ----------------------------------------------------------------------------------------------


def in_float64(
    case: Case, magnitude: float = 1.0, scaled: tuple[int, ...] = (0,)
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and its inputs promoted, the inputs named by `scaled` multiplied by `magnitude`."""
    args = [a.double() if a.is_floating_point() else a for a in case.example()]
    for i in scaled:
        args[i] = args[i] * magnitude
    return case.build().double(), tuple(args)


@contextmanager
def promoted() -> Iterator[None]:
    """Every cast, reduction and factory that asks for a lower floating dtype gets float64 instead."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promote(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


class _Promote(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def up(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value in LOW else value

        return func(*tree_map(up, args), **tree_map(up, kwargs or {}))


def distance(actual: Outputs, expected: Outputs) -> float:
    """The worst relative error of an output in the Euclidean norm; what is not finite must be so in both."""
    pairs = zip(_listed(actual), _listed(expected), strict=True)
    return max(_error(a, e) for a, e in pairs)


def _listed(value: Outputs) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    a, e = actual[finite].double(), expected[finite].double()
    return float((a - e).norm() / e.norm().clamp_min(torch.finfo(torch.float64).tiny))
