"""Every function of normfuse.functional with parameters that are nowhere at their defaults, and what it means in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normfuse.functional as nf


@dataclass(frozen=True)
class Case:
    """`run(kernel, *tensors)`; `plain(*tensors)` is written independently; `extra(n)` are the shapes of the parameters."""

    name: str
    run: Callable[..., Any]
    plain: Callable[..., Any]
    extra: Callable[[int], list[tuple[int, ...]]] = lambda n: []
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, n: (rows, n)

    def tensors(self, rows: int, n: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape(rows, n), generator=draw, dtype=torch.float64) * 1.3 + 0.4
        others = [torch.rand(shape, generator=draw, dtype=torch.float64) + 0.3 for shape in self.extra(n)]
        if self.name.startswith("add_"):
            others[0] = torch.randn(self.shape(rows, n), generator=draw, dtype=torch.float64)
        return [t.to(dtype) for t in (x, *others)]


EPS = 3e-4


def _rms(x: Tensor, *affine: Tensor) -> Tensor:
    return _affine(x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt(), *affine)


def _affine(y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return (y if weight is None else y * weight) + (0 if bias is None else bias)


def _channel(p: Tensor) -> Tensor:
    return p[None, :, None]


def _evo(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    grouped = x.reshape(x.shape[0], 2, -1)
    std = (grouped.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    y = (x * torch.sigmoid(_channel(v) * x)).reshape(grouped.shape) / std
    return y.reshape(x.shape) * _channel(w) + _channel(b)


def _project(x: Tensor, power: int) -> Tensor:
    """Sparsemax and entmax-1.5 by their sorts."""
    z = x if power == 1 else x / 2
    s = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = s.cumsum(-1) / k
    if power == 1:
        tau = mean - 1 / k
    else:
        delta = (1 - k * (s.square().cumsum(-1) / k - mean.square())) / k
        tau = mean - delta.clamp_min(0).sqrt()
    support = (s > tau).sum(-1, keepdim=True) if power == 1 else (tau <= s).sum(-1, keepdim=True)
    return (z - tau.gather(-1, support - 1)).clamp_min(0).pow(power)


def _stable(x: Tensor) -> Tensor:
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp_max(0)))
    return s / s.sum(-1, keepdim=True)


def _seed(heads: int) -> Callable[..., Tensor]:
    def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        s = torch.tanh((x * b).unflatten(-1, (heads, -1)).sum(-1)).repeat_interleave(x.shape[-1] // heads, -1)
        return (s * a + w) * _rms(x)

    return plain


def _added(norm: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda x, r, *affine: (norm(x + r, *affine), x + r)


def _layer(x: Tensor, *affine: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *affine, eps=EPS)


def _weight(w: Tensor, gain: Tensor) -> Tensor:
    rows = w.flatten(1)
    y = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + EPS)
    return y.reshape(w.shape) * gain


def _columns(count: int) -> Callable[[int], list[tuple[int, ...]]]:
    return lambda n: [(n,)] * count


def _named(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda kernel, *tensors: function(*tensors, **options, kernel=kernel)


_image = {"shape": lambda rows, n: (rows, 4, n)}

CASES = (
    Case("rms_norm", _named(nf.rms_norm, eps=EPS), _rms, _columns(2)),
    Case("rms_norm_plain", _named(nf.rms_norm, eps=EPS), _rms),
    Case("layer_norm", _named(nf.layer_norm, eps=EPS), _layer, _columns(2)),
    Case("add_rms_norm", _named(nf.add_rms_norm, eps=EPS), _added(_rms), lambda n: [(1,), (n,)]),
    Case("add_layer_norm", _named(nf.add_layer_norm, eps=EPS), _added(_layer), lambda n: [(1,), (n,), (n,)]),
    Case(
        "crms_norm", _named(nf.crms_norm, eps=EPS),
        lambda x: x / ((x.pow(2).sum(-1, True) + x.sum(-1, True).pow(2)) / (x.shape[-1] + 1) + EPS).sqrt(),
    ),
    Case("l2_norm", _named(nf.l2_norm, eps=EPS), lambda x: F.normalize(x, dim=-1, eps=EPS)),
    Case(
        "group_norm", lambda kernel, x, w, b: nf.group_norm(x, 2, w, b, eps=EPS, kernel=kernel),
        lambda x, w, b: F.group_norm(x, 2, w, b, EPS), lambda n: [(4,)] * 2, **_image,
    ),
    Case(
        "instance_norm", _named(nf.instance_norm, eps=EPS),
        lambda x, w, b: F.group_norm(x, 4, w, b, EPS), lambda n: [(4,)] * 2, **_image,
    ),
    Case("scale_norm", _named(nf.scale_norm, eps=EPS), lambda x, g: g * F.normalize(x, dim=-1, eps=EPS), lambda n: [(1,)]),
    Case("dyt", _named(nf.dyt), lambda x, a, *p: _affine(torch.tanh(a * x), *p), lambda n: [(1,), (n,), (n,)]),
    Case(
        "derf", _named(nf.derf), lambda x, a, s, *p: _affine(torch.erf(a * x + s), *p),
        lambda n: [(), (1,), (n,), (n,)],
    ),
    Case(
        "dyisru", _named(nf.dyisru),
        lambda x, b, *p: _affine(x.shape[-1] ** 0.5 * x / (b + x * x).sqrt(), *p), lambda n: [(1,), (n,), (n,)],
    ),
    Case("seed_norm", _named(nf.seed_norm, eps=EPS), _seed(1), _columns(3)),
    Case("evo_norm_s0", _named(nf.evo_norm_s0, groups=2, eps=EPS), _evo, lambda n: [(4,)] * 3, **_image),
    Case("softmax", _named(nf.softmax), lambda x: F.softmax(x, -1)),
    Case("softmax_three_pass", _named(nf.softmax, algorithm="three_pass"), lambda x: F.softmax(x, -1)),
    Case("softmax_two_pass", _named(nf.softmax, algorithm="two_pass"), lambda x: F.softmax(x, -1)),
    Case("log_softmax", _named(nf.log_softmax), lambda x: F.log_softmax(x, -1)),
    Case(
        "softmax_with_sink", _named(nf.softmax_with_sink),
        lambda x, s: F.softmax(torch.cat([x, s.expand(x.shape[0], 1)], -1), -1)[:, :-1], lambda n: [(1, 1)],
    ),
    Case("sparsemax", _named(nf.sparsemax), lambda x: _project(x, 1)),
    Case("entmax15", _named(nf.entmax15), lambda x: _project(x, 2)),
    Case("stablemax", _named(nf.stablemax), _stable),
    Case(
        "standardize_weight",
        lambda kernel, w, g: nf.standardize_weight(w, eps=EPS, correction=1, place="outside", gain=g, kernel=kernel),
        _weight, lambda n: [(3, 1, 1)], lambda rows, n: (3, n, 2),
    ),
)  # fmt: skip
SEED_HEADS = Case("seed_norm_heads", _named(nf.seed_norm, heads=4, eps=EPS), _seed(4), _columns(3))

EACH = {case.name: case for case in (*CASES, SEED_HEADS)}


def flat(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, (tuple, list)) else [found]
