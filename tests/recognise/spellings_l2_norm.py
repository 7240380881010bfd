"""Division by the Euclidean norm: F.normalize, ScaleNorm, QK norm, embeddings for retrieval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import WIDTH, Outputs, Reference, Spelling, Stateless, gain, named, rows

ROOT = math.sqrt(WIDTH)


# -- functions of a tensor -----------------------------------------------------------------------------------


def normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def normalize_p2_eps(x: Tensor) -> Tensor:
    return F.normalize(x, p=2.0, dim=-1, eps=1e-6)


def normalize_channels(x: Tensor) -> Tensor:
    """SuperPoint, VQ codebooks over images."""
    return F.normalize(x, p=2, dim=1)


def normalize_upcast(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1).to(x.dtype)


def clip(x: Tensor) -> Tensor:
    """CLIP's embeddings: no eps."""
    return x / x.norm(p=2, dim=-1, keepdim=True)


def clip_newer(x: Tensor) -> Tensor:
    """transformers' _get_vector_norm, written so for ExecuTorch."""
    square_tensor = torch.pow(x, 2)
    sum_tensor = torch.sum(square_tensor, dim=-1, keepdim=True)
    return x / torch.pow(sum_tensor, 0.5)


def linalg_norm(x: Tensor) -> Tensor:
    return x / torch.linalg.norm(x, ord=2, dim=-1, keepdim=True)


def owl(x: Tensor) -> Tensor:
    """OWL-ViT: eps outside."""
    return x / (torch.linalg.norm(x, dim=-1, keepdim=True) + 1e-6)


def delta_net(x: Tensor) -> Tensor:
    """flash-linear-attention's l2norm: eps inside."""
    inv_norm = torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)
    return x * inv_norm


def tensorflow(x: Tensor) -> Tensor:
    """tf.math.l2_normalize: the sum of squares kept above eps."""
    square_sum = torch.sum(torch.square(x), dim=-1, keepdim=True)
    return x * torch.rsqrt(torch.clamp_min(square_sum, 1e-12))


def written_out_normalize(x: Tensor) -> Tensor:
    """F.normalize as its documentation has it."""
    denominator = x.norm(2, -1, keepdim=True).clamp_min(1e-12).expand_as(x)
    return x / denominator


def maximum(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.maximum(norm, torch.full_like(norm, 1e-4))


def einsum(x: Tensor) -> Tensor:
    return x / torch.einsum("btd,btd->bt", x, x).sqrt().clamp(min=1e-8)[..., None]


def through_mean(x: Tensor) -> Tensor:
    """The sum as mean times n."""
    return x * (x.square().mean(-1, keepdim=True) * x.shape[-1] + 1e-6).rsqrt()


def several_axes(x: Tensor) -> Tensor:
    """A whole matrix to unit Frobenius norm."""
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-7)


def reciprocal(x: Tensor) -> Tensor:
    return x.mul(x.pow(2).sum(dim=-1).sqrt().add(1e-5).reciprocal().unsqueeze(-1))


def cosine_scores(x: Tensor, y: Tensor) -> Tensor:
    """A similarity matrix of two sets."""
    x = x / x.norm(dim=-1, keepdim=True)
    y = F.normalize(y, dim=-1)
    return x @ y.transpose(-2, -1)


# -- with a scale --------------------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """Nguyen and Salazar: one scalar gain, the norm kept above eps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.7))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.scale / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-5)
        return x * norm


class ScaleNormShaped(nn.Module):
    """x-transformers: g of one element, sqrt(d) in the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.g = gain(1)

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.norm(x, dim=-1, keepdim=True) * WIDTH**-0.5
        return x / norm.clamp(min=1e-5) * self.g


class LucidrainsRms(nn.Module):
    """lucidrains' RMSNorm: F.normalize, sqrt(d), gamma; the same function as an RMSNorm with a floor."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = gain(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * ROOT * (self.gamma + 1)


class LucidrainsRmsChannels(nn.Module):
    """The same over the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.g = gain(1, WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * (x.shape[1] ** 0.5)


class Zaya(nn.Module):
    """q and k to the norm sqrt(d), k by a temperature for each head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.temp = gain(3)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q * (ROOT / q.norm(p=2, dim=-1, keepdim=True).clamp_min(1e-7))
        k = k * (ROOT / k.norm(p=2, dim=-1, keepdim=True).clamp_min(1e-7))
        return q, k * self.temp[None, None, :, None]


class UnitQueriesAndKeys(nn.Module):
    """nGPT and ViT-22B descendants: unit vectors, a learned scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.sqk = gain(3, WIDTH)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        s = self.sqk * 4.0
        return s * F.normalize(q, dim=-1), s * k.div(k.norm(dim=-1, keepdim=True) + 1e-6)


def _floor(axis: int, eps: float) -> Reference:
    return lambda m, x: F.normalize(x, dim=axis, eps=eps)


def _inside(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), eps=1e-6 / WIDTH) / ROOT


def _outside(eps: float) -> Reference:
    return lambda m, x: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps)


def _frobenius(m: Any, x: Tensor) -> Tensor:
    return F.normalize(x.flatten(-2), dim=-1, eps=1e-7).view_as(x)


def _cosines(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x[:, :, None], y[:, None], dim=-1, eps=0.0)


def _scale_norm(m: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-5) * m.scale


def _scale_norm_shaped(m: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-5 * ROOT) * ROOT * m.g


def _lucidrains(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), 1 + m.gamma, eps=1e-300)


def _lucidrains_channels(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x.movedim(1, -1), (WIDTH,), m.g.flatten(), eps=1e-300).movedim(-1, 1)


def _zaya(m: Any, q: Tensor, k: Tensor) -> Outputs:
    q, k = (F.normalize(x, dim=-1, eps=1e-7) * ROOT for x in (q, k))
    return q, k * m.temp[:, None]


def _unit(m: Any, q: Tensor, k: Tensor) -> Outputs:
    k = k / (torch.linalg.vector_norm(k, dim=-1, keepdim=True) + 1e-6)
    return F.normalize(q, dim=-1) * m.sqk * 4.0, k * m.sqk * 4.0


def _l2(make: Callable[[], nn.Module], **given: Any) -> Spelling:
    said: dict[str, Any] = dict(name="l2_norm_" + named(make), axes=(-1,), eps_place="clamp")
    said |= dict(inputs=lambda: (rows(2, 5, WIDTH),), magnitudes=(1.0, 1e-2, 1e3, 0.0))
    return Spelling(kind="l2_norm", make=make, **(said | given))


def _of(function: Callable[..., Outputs], *, eps: float, **given: Any) -> Spelling:
    said: dict[str, Any] = dict(name="l2_norm_" + named(function), eps=eps, reference=_floor(-1, eps))
    return _l2(lambda: Stateless(function), **(said | given))


def _image() -> tuple[Tensor, ...]:
    return (rows(2, WIDTH, 3, 5),)


def _pair() -> tuple[Tensor, ...]:
    return rows(2, 5, WIDTH), rows(2, 7, WIDTH)


def _heads() -> tuple[Tensor, ...]:
    return rows(2, 5, 3, WIDTH), rows(2, 5, 3, WIDTH)


SPELLINGS: tuple[Spelling, ...] = (
    _of(normalize, eps=1e-12),
    _of(normalize_p2_eps, eps=1e-6),
    _of(normalize_channels, eps=1e-12, axes=(-3,), inputs=_image, reference=_floor(1, 1e-12)),
    _of(normalize_upcast, eps=1e-12, dtype=torch.bfloat16),
    _of(clip, eps=0.0, magnitudes=(1.0, 1e-3, 1e3)),
    _of(clip_newer, eps=0.0, magnitudes=(1.0, 1e-3, 1e3)),
    _of(linalg_norm, eps=0.0, magnitudes=(1.0, 1e-3, 1e3)),
    _of(owl, eps=1e-6, eps_place="outside", reference=_outside(1e-6)),
    _of(delta_net, eps=1e-6, eps_place="inside", reference=_inside),
    _of(tensorflow, eps=1e-12, eps_place="clamp_inside", reference=_floor(-1, 1e-6)),
    _of(written_out_normalize, eps=1e-12),
    _of(maximum, eps=1e-4),
    _of(einsum, eps=1e-8),
    _of(through_mean, eps=1e-6, eps_place="inside", reference=_inside),
    _of(several_axes, eps=1e-7, axes=(-2, -1), reference=_frobenius),
    _of(reciprocal, eps=1e-5, eps_place="outside", reference=_outside(1e-5)),
    _of(cosine_scores, eps=None, count=2, inputs=_pair, reference=_cosines, magnitudes=(1.0, 1e-2)),  # type: ignore[arg-type]
    _l2(ScaleNorm, eps=1e-5, affine="weight", or_affine=("none",), reference=_scale_norm),
    _l2(
        ScaleNormShaped,
        eps=1e-5 * ROOT,
        affine="weight",
        or_affine=("none",),
        or_kinds=("rms_norm",),
        reference=_scale_norm_shaped,
    ),
    _l2(
        LucidrainsRms,
        eps=1e-12,
        affine="weight",
        or_affine=("none",),
        or_kinds=("rms_norm",),
        reference=_lucidrains,
    ),
    _l2(
        LucidrainsRmsChannels,
        eps=1e-12,
        axes=(-3,),
        affine="weight",
        or_affine=("none",),
        or_kinds=("rms_norm",),
        inputs=_image,
        reference=_lucidrains_channels,
    ),
    _l2(
        Zaya,
        eps=1e-7,
        count=2,
        affine="weight",
        or_affine=("none",),
        inputs=_heads,
        scaled=(0, 1),
        reference=_zaya,
    ),
    _l2(
        UnitQueriesAndKeys,
        eps=None,
        count=2,
        affine="weight",
        or_affine=("none",),
        inputs=_heads,
        scaled=(0, 1),
        reference=_unit,
    ),
)
