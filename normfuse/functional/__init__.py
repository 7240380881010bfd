"""Row functions: norms, squashing functions and the softmax family, each one operator with a gradient.

All take `kernel="auto" | "triton" | "reference"`: the generated Triton kernel on a GPU and the reference elsewhere, or one
of them by name. Statistics are in float32 for half precision and in float64 for float64; the output has the dtype and
shape of `x`; parameters may be of another dtype, and their gradients have theirs. `axis` is the channel axis.

Raises, all of them:
    NormfuseError: `x` is no floating point tensor or has no axis `axis`; a parameter does not fit; an unknown kernel;
        a Triton kernel where none can run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import NormfuseError
from normfuse.functional import references
from normfuse.functional.operators import RowOperator
from normfuse.ops import operators
from normfuse.ops.derive import derive, is_callable

__all__ = [
    "OPERATORS", "add_layer_norm", "add_rms_norm", "crms_norm", "derf", "dyisru", "dyt", "entmax15", "evo_norm_s0",
    "group_norm", "instance_norm", "kernel_source", "l2_norm", "layer_norm", "log_softmax", "rms_norm", "scale_norm",
    "seed_norm", "softmax", "softmax_with_sink", "sparsemax", "stablemax", "standardize_weight",
]  # fmt: skip

_KINDS = {"eps": "float", "cast": "str", "scale": "float", "correction": "int", "place": "str"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AFFINE = ("x", "weight?", "bias?")
_EVO = ("x", "weight", "bias", "v")
_SUM = ("y", "sum")
_ADDED = ("x", "residual", "weight?", "bias?")

OPERATORS = tuple(
    operator.register(_KINDS)
    for operator in (
        RowOperator("rms_norm", references.rms_norm, _AFFINE, ("eps", "cast")),
        RowOperator("layer_norm", references.layer_norm, _AFFINE, ("eps",)),
        RowOperator("add_rms_norm", references.add_rms_norm, _ADDED, ("eps", "cast"), _SUM, carried="carried_rms_norm"),
        RowOperator("carried_rms_norm", references.carried_rms_norm, _AFFINE, ("eps", "cast"), _SUM, inner=True),
        RowOperator("add_layer_norm", references.add_layer_norm, _ADDED, ("eps",), _SUM, carried="carried_layer_norm"),
        RowOperator("carried_layer_norm", references.carried_layer_norm, _AFFINE, ("eps",), _SUM, inner=True),
        RowOperator("crms_norm", references.crms_norm, options=("eps",)),
        RowOperator("l2_norm", references.l2_norm, options=("eps",)),
        RowOperator("scale_norm", references.scale_norm, ("x", "gain"), ("eps",), numbers=("gain",)),
        RowOperator("dyt", references.dyt, ("x", "alpha", "weight?", "bias?"), numbers=("alpha",)),
        RowOperator("derf", references.derf, ("x", "alpha", "shift", "weight?", "bias?"), numbers=("alpha", "shift")),
        RowOperator("dyisru", references.dyisru, ("x", "beta", "weight?", "bias?"), ("scale",), numbers=("beta",)),
        RowOperator("seed_norm", references.seed_norm, ("x", "weight", "alpha", "beta"), ("eps",)),
        RowOperator("seed_norm_gated", references.seed_norm_gated, ("x", "weight", "alpha", "gate"), ("eps",)),
        RowOperator("evo_norm_s0", references.evo_norm_s0, _EVO, ("eps",), matrices=_EVO),
        RowOperator("softmax", references.softmax),
        RowOperator("softmax_three_pass", references.softmax, online=False),
        RowOperator("softmax_two_pass", references.softmax_two_pass, derived=references.softmax),
        RowOperator("log_softmax", references.log_softmax),
        RowOperator("softmax_with_sink", references.softmax_with_sink, ("x", "sink"), numbers=("sink",)),
        RowOperator("sparsemax", references.sparsemax),
        RowOperator("entmax15", references.entmax15),
        RowOperator("stablemax", references.stablemax),
        RowOperator("standardize_weight", references.standardize_weight, ("w", "gain?"), ("eps", "correction", "place")),
    )
)
_rows = torch.ops.normfuse_rows


def rms_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, axis: int = -1,
    cast: str = "last", kernel: str = "auto",
) -> Tensor:  # fmt: skip
    """weight * x / sqrt(mean(x**2) + eps) + bias. `weight` and `bias` have `x.shape[axis]` entries.

    `cast` says where half precision is rounded: `"last"`, once at the end, as torch does (and Gemma, whose gain is
    float32), or `"first"`, before the gain, as Llama does. Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """
    if cast not in ("first", "last"):
        raise NormfuseError(f"unknown cast {cast!r}: 'first' (before the gain) or 'last'")
    rows = _along(x, axis)
    return _back(_rows.rms_norm(rows, *_channels(rows, weight=weight, bias=bias), eps, cast, kernel), x, axis)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, axis: int = -1, kernel: str = "auto"
) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias. Ba et al. 2016 (arXiv 1607.06450)."""
    rows = _along(x, axis)
    return _back(_rows.layer_norm(rows, *_channels(rows, weight=weight, bias=bias), eps, kernel), x, axis)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float,
    cast: str = "last", kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rms_norm(s), s) with s = x + residual, rounded to the dtype of `x`."""
    if cast not in ("first", "last"):
        raise NormfuseError(f"unknown cast {cast!r}: 'first' (before the gain) or 'last'")
    rows, other = _along(x, -1), _same(x, residual)
    return _rows.add_rms_norm(rows, other, *_channels(rows, weight=weight, bias=bias), eps, cast, kernel)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(layer_norm(s), s) with s = x + residual, rounded to the dtype of `x`."""
    rows, other = _along(x, -1), _same(x, residual)
    return _rows.add_layer_norm(rows, other, *_channels(rows, weight=weight, bias=bias), eps, kernel)


def crms_norm(x: Tensor, *, eps: float, kernel: str = "auto") -> Tensor:
    """x / sqrt((sum(x**2) + sum(x)**2) / d + eps) for the d - 1 stored channels of d with mean zero.

    Jiang et al. 2023 (arXiv 2305.14858), eq. 9.
    """
    return _rows.crms_norm(_along(x, -1), eps, kernel)


def l2_norm(x: Tensor, *, eps: float, axis: int = -1, kernel: str = "auto") -> Tensor:
    """x / max(norm(x), eps), as `torch.nn.functional.normalize`."""
    return _back(_rows.l2_norm(_along(x, axis), eps, kernel), x, axis)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, kernel: str = "auto"
) -> Tensor:
    """layer_norm over the channels of a group and all positions; `x` is (N, C, ...), the affine part per channel.

    Wu & He 2018 (arXiv 1803.08494).
    """
    rows = _grouped(x, groups)
    weight, bias = _by_channel(x, rows, groups, weight=weight, bias=bias)
    return _rows.layer_norm(rows, weight, bias, eps, kernel).reshape(x.shape)


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, kernel: str = "auto"
) -> Tensor:
    """group_norm with a group for each channel. Ulyanov et al. 2016 (arXiv 1607.08022)."""
    _checked(x)
    return group_norm(x, x.shape[1] if x.dim() > 1 else 1, weight, bias, eps=eps, kernel=kernel)


def scale_norm(x: Tensor, gain: Tensor, *, eps: float, kernel: str = "auto") -> Tensor:
    """gain * x / max(norm(x), eps); `gain` broadcasts. Nguyen & Salazar 2019 (arXiv 1910.05895)."""
    rows = _along(x, -1)
    return _rows.scale_norm(rows, _broadcast("gain", gain, x, -1), eps, kernel)


def dyt(
    x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, axis: int = -1,
    kernel: str = "auto",
) -> Tensor:  # fmt: skip
    """weight * tanh(alpha * x) + bias; `alpha` broadcasts. Zhu et al. 2025 (arXiv 2503.10622)."""
    rows = _along(x, axis)
    alpha = _broadcast("alpha", alpha, x, axis)
    return _back(_rows.dyt(rows, alpha, *_channels(rows, weight=weight, bias=bias), kernel), x, axis)


def derf(
    x: Tensor, alpha: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, axis: int = -1,
    kernel: str = "auto",
) -> Tensor:  # fmt: skip
    """weight * erf(alpha * x + shift) + bias; `alpha` and `shift` broadcast. arXiv 2512.10938."""
    rows = _along(x, axis)
    alpha, shift = _broadcast("alpha", alpha, x, axis), _broadcast("shift", shift, x, axis)
    return _back(_rows.derf(rows, alpha, shift, *_channels(rows, weight=weight, bias=bias), kernel), x, axis)


def dyisru(
    x: Tensor, beta: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, kernel: str = "auto"
) -> Tensor:
    """weight * sqrt(C) * x / sqrt(beta + x**2) + bias for C channels; `beta` > 0 broadcasts. arXiv 2503.21708."""
    rows = _along(x, -1)
    channels = _channels(rows, weight=weight, bias=bias)
    return _rows.dyisru(rows, _broadcast("beta", beta, x, -1), *channels, math.sqrt(x.shape[-1]), kernel)


def seed_norm(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, *, heads: int = 1, eps: float, kernel: str = "auto"
) -> Tensor:
    """(tanh(x . beta) * alpha + weight) * x / sqrt(mean(x**2) + eps), the dot product taken in each of `heads` slices.

    `weight`, `alpha` and `beta` have `x.shape[-1]` entries. SeeDNorm (arXiv 2510.22777).
    """
    rows = _along(x, -1)
    weight, alpha, beta = _channels(rows, weight=weight, alpha=alpha, beta=beta)  # type: ignore[assignment]
    if heads == 1:
        return _rows.seed_norm(rows, weight, alpha, beta, eps, kernel)
    if heads < 1 or x.shape[-1] % heads:
        raise NormfuseError(f"{x.shape[-1]} channels cannot be cut into {heads} heads")
    products = references.wide(x) * references.wide(beta)
    gate = torch.tanh(products.unflatten(-1, (heads, -1)).sum(-1, keepdim=True))
    gate = gate.expand(*x.shape[:-1], heads, x.shape[-1] // heads).flatten(-2)
    return _rows.seed_norm_gated(rows, weight, alpha, gate, eps, kernel)


def evo_norm_s0(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, *, groups: int, eps: float, kernel: str = "auto"
) -> Tensor:
    """weight * x * sigmoid(v * x) / sqrt(var(group) + eps) + bias; `x` is (N, C, ...). Liu et al. 2020 (2004.02967)."""
    rows = _grouped(x, groups)
    channels = _by_channel(x, rows, groups, weight=weight, bias=bias, v=v)
    return _rows.evo_norm_s0(rows, *channels, eps, kernel).reshape(x.shape)


def softmax(x: Tensor, *, axis: int = -1, algorithm: str = "auto", kernel: str = "auto") -> Tensor:
    """exp(x) / sum(exp(x)), by one of three algorithms, which differ in how often a row longer than a block is read.

    `"three_pass"`: its maximum, its sum, its results. `"online"` (and `"auto"`): maximum and sum together (Milakov &
    Gimelshein 2018, arXiv 1805.02867). `"two_pass"`: exponentials and their sum as pairs of mantissa and exponent (Dukhan
    & Ablavatski 2020, arXiv 2001.04438), for |x| up to 4e4. A row that is all -inf or holds +inf is nan.
    """
    rows = _along(x, axis)
    if algorithm in ("auto", "online"):
        y = _rows.softmax(rows, kernel)
    elif algorithm == "three_pass":
        y = _rows.softmax_three_pass(rows, kernel)
    elif algorithm == "two_pass":
        y = _rows.softmax_two_pass(rows, kernel)
    else:
        raise NormfuseError(f"unknown algorithm {algorithm!r}: 'auto', 'three_pass', 'online' or 'two_pass'")
    return _back(y, x, axis)


def log_softmax(x: Tensor, *, axis: int = -1, kernel: str = "auto") -> Tensor:
    """x - log(sum(exp(x))). A row that is all -inf or holds +inf is nan."""
    return _back(_rows.log_softmax(_along(x, axis), kernel), x, axis)


def softmax_with_sink(x: Tensor, sink: Tensor | float, *, axis: int = -1, kernel: str = "auto") -> Tensor:
    """exp(x) / (exp(sink) + sum(exp(x))). `sink` broadcasts with size 1 along `axis`; 0 gives "off by one".

    A row that is all -inf is zeros where the sink is finite.
    """
    rows = _along(x, axis)
    if not isinstance(sink, Tensor):
        sink = torch.full(
            (), float(sink), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
        )
    if sink.dim() == x.dim() and sink.numel() != 1 and sink.shape[axis] != 1:
        raise NormfuseError(f"a sink has size 1 along axis {axis}, not {sink.shape[axis]}")
    return _back(_rows.softmax_with_sink(rows, _broadcast("sink", sink, x, axis), kernel), x, axis)


def sparsemax(x: Tensor, *, axis: int = -1, kernel: str = "auto") -> Tensor:
    """The projection of `x` on the simplex. Needs a finite entry. Martins & Astudillo 2016 (arXiv 1602.02068)."""
    return _back(_rows.sparsemax(_along(x, axis), kernel), x, axis)


def entmax15(x: Tensor, *, axis: int = -1, kernel: str = "auto") -> Tensor:
    """max(x / 2 - tau, 0)**2 with the tau that makes the sum 1. Needs a finite entry. Peters et al. 2019 (1905.05702)."""
    return _back(_rows.entmax15(_along(x, axis), kernel), x, axis)


def stablemax(x: Tensor, *, axis: int = -1, kernel: str = "auto") -> Tensor:
    """s(x) / sum(s(x)) with s = x + 1 from zero up and 1 / (1 - x) below. Prieto et al. 2025 (arXiv 2501.04697)."""
    return _back(_rows.stablemax(_along(x, axis), kernel), x, axis)


def standardize_weight(
    w: Tensor, *, eps: float, correction: int = 0, place: str = "inside", gain: Tensor | None = None, kernel: str = "auto"
) -> Tensor:
    """gain * (w - mean) / sqrt(var + eps), or / (sqrt(var) + eps) where `place` is `"outside"`, per output channel.

    `correction` is taken from the count of the variance; `gain` is (out, 1, ..., 1). Qiao et al. 2019 (arXiv 1903.10520).
    """
    if place not in ("inside", "outside"):
        raise NormfuseError(f"unknown place {place!r} of eps: 'inside' or 'outside' of the root")
    _checked(w)
    if w.dim() < 2:
        raise NormfuseError("a weight to standardize has at least two axes")
    if gain is not None and gain.numel() not in (1, w.shape[0]):
        raise NormfuseError(f"gain has {gain.numel()} entries, not one for each of {w.shape[0]} output channels")
    factor = None if gain is None else gain.reshape(-1, 1)
    return _rows.standardize_weight(w.flatten(1), factor, eps, correction, place, kernel).reshape(w.shape)


def kernel_source(
    name: str, columns: int, dtype: torch.dtype = torch.bfloat16, *, backward: bool = False, **options: object
) -> str:
    """The Triton kernel of an operator for rows of this width, as a Python file that needs torch and triton alone.

    `name` is one of `[each.name for each in OPERATORS]`; `options` are the operator's own, such as `eps`.

    Raises:
        NormfuseError: no such operator, a missing option, or rows that have no kernel.
    """
    from normfuse.lower.triton.standalone import standalone

    found = {operator.name: operator for operator in OPERATORS}
    if name not in found:
        raise NormfuseError(f"no row operator {name!r}: one of {', '.join(sorted(found))}")
    operator = found[name]
    kernel = operator.usual(dtype, dict(options))
    if backward and operator.derived:
        kernel = replace(operator, reference=operator.derived, derived=None).usual(dtype, dict(options))
    return standalone(kernel, columns, backward=backward)


# --- tensors as rows along the last axis


def _checked(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        name = str(x.dtype).removeprefix("torch.")
        raise NormfuseError(f"rows are floating point numbers of 16 to 64 bits, not {name}: convert them first")


def _along(x: Tensor, axis: int) -> Tensor:
    _checked(x)
    if not -x.dim() <= axis < x.dim():
        raise NormfuseError(f"axis {axis} is not one of the {x.dim()} axes of x")
    return x if axis in (-1, x.dim() - 1) else x.movedim(axis, -1)


def _back(y: Tensor, x: Tensor, axis: int) -> Tensor:
    return y if axis in (-1, x.dim() - 1) else y.movedim(-1, axis)


def _same(x: Tensor, residual: Tensor) -> Tensor:
    _checked(residual)
    if residual.shape != x.shape:
        raise NormfuseError(f"the residual is {tuple(residual.shape)}, not {tuple(x.shape)} as x")
    return residual


def _channels(rows: Tensor, **parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters with an entry for each channel."""
    for name, p in parameters.items():
        if p is not None and (p.dim() != 1 or p.shape[0] != rows.shape[-1]):
            raise NormfuseError(f"{name} is {tuple(p.shape)}, not ({rows.shape[-1]},): one entry for each channel")
        if p is not None:
            _checked(p)
    return list(parameters.values())


def _broadcast(name: str, p: Tensor, x: Tensor, axis: int) -> Tensor:
    """A parameter that broadcasts against `x`, with its axes where those of the rows are."""
    _checked(p)
    fits = p.dim() <= x.dim() and all(a in (1, b) for a, b in zip(p.shape[::-1], x.shape[::-1], strict=False))
    if not fits and p.numel() != 1:
        raise NormfuseError(f"{name} is {tuple(p.shape)} and does not broadcast against {tuple(x.shape)}")
    if p.dim() <= 1 and p.numel() == 1:
        return p.reshape(())
    return p.reshape(*[1] * (x.dim() - p.dim()), *p.shape).movedim(axis, -1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """A row for each group of channels of each sample."""
    _checked(x)
    if x.dim() < 2:
        raise NormfuseError("x has no channels: it must be (N, C, ...)")
    if groups < 1 or x.shape[1] % groups:
        raise NormfuseError(f"{x.shape[1]} channels cannot be cut into {groups} groups")
    return x.reshape(x.shape[0], groups, (x.shape[1] // groups) * math.prod(x.shape[2:]))


def _by_channel(x: Tensor, rows: Tensor, groups: int, **parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters with an entry for each channel as (groups, row) or, where a group is one channel, (groups, 1)."""
    found: list[Tensor | None] = []
    for name, p in parameters.items():
        if p is not None and (p.dim() != 1 or p.shape[0] != x.shape[1]):
            raise NormfuseError(f"{name} is {tuple(p.shape)}, not ({x.shape[1]},): one entry for each channel")
        if p is None or groups == x.shape[1]:
            found.append(p if p is None else p.reshape(1, groups, 1))
            continue
        each = p.reshape(1, groups, -1, 1)
        found.append(each.expand(1, groups, each.shape[2], math.prod(x.shape[2:])).reshape(1, groups, rows.shape[-1]))
    return found


def __getattr__(name: str) -> Callable[..., Any]:
    """A known function that has no kernel of its own here is derived from its record in `ops`."""
    record = next((r for r in operators() if r.stem == name and is_callable(r)), None)
    if record is None:
        raise AttributeError(f"module 'normfuse.functional' has no function {name!r}: it has {', '.join(__dir__())}")
    return derive(record)


def __dir__() -> list[str]:
    return sorted({*__all__, *(record.stem for record in operators() if is_callable(record))})
