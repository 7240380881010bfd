"""Attention of given queries, keys and values, no mask: how products, scale and softmax are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import Outputs, Spelling, Stateless, named

HEADS, DIM = 3, 8
ROOT = math.sqrt(DIM)


def heads(batch: int = 2, length: int = 5, count: int = HEADS, dim: int = DIM) -> Tensor:
    """(batch, heads, length, dim), off centre."""
    return 1.2 * torch.randn(batch, count, length, dim) + 0.4 * torch.randn(dim)


# -- scale ---------------------------------------------------------------------------------------------------


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def fused_own_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.21)


def bert(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention_scores = torch.matmul(q, k.transpose(-1, -2))
    attention_scores = attention_scores / math.sqrt(q.shape[-1])
    attention_probs = nn.functional.softmax(attention_scores, dim=-1)
    return torch.matmul(attention_probs, v)


def llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager attention: softmax in float32, cast back."""
    attn_weights = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=0.1, training=False)
    return torch.matmul(attn_weights, v).transpose(1, 2).contiguous()


def scale_on_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """timm, BEiT, Swin."""
    q = q * ROOT**-1
    attn = q @ k.transpose(-2, -1)
    return attn.softmax(dim=-1) @ v


def scale_divides_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XLM, FlauBERT."""
    q = q / math.sqrt(DIM)
    scores = torch.matmul(q, k.transpose(2, 3))
    weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(weights, v)


def scale_on_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DaViT."""
    k = k * DIM**-0.5
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whisper and OpenAI's diffusion code: each by the fourth root."""
    scale = DIM**-0.25
    qk = (q * scale) @ (k * scale).transpose(-1, -2)
    return F.softmax(qk, dim=-1) @ v


def scale_from_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / torch.sqrt(torch.tensor(k.size(-1), dtype=q.dtype))
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5, GPT-Neo: the scale lives in the weights."""
    scores = torch.matmul(q, k.transpose(3, 2))
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


class ScaleBuffer(nn.Module):
    """GPT-J: divided by a buffer, float32 for the scores."""

    scale_attn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_attn", torch.tensor(2.75))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn_weights = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
        attn_weights = attn_weights / self.scale_attn
        attn_weights = nn.functional.softmax(attn_weights, dim=-1)
        return torch.matmul(attn_weights.to(v.dtype), v)


class LogitScale(nn.Module):
    """Swin v2: unit vectors, a clamped temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.rand(HEADS, 1, 1) + 2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        return attn.softmax(dim=-1) @ v


class QueriesNormed(nn.Module):
    """ViT-22B, Qwen3: q and k through RMSNorms first."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(DIM, eps=1e-6), nn.RMSNorm(DIM, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.q_norm(q) * DIM**-0.5, self.k_norm(k)
        return (q @ k.mT).softmax(-1) @ v


# -- products ------------------------------------------------------------------------------------------------


def lucidrains(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    attn = sim.softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


def flax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, length, heads, dim) throughout, as flax.linen.dot_product_attention."""
    q = q / math.sqrt(q.shape[-1])
    weights = torch.einsum("...qhd,...khd->...hqk", q, k)
    return torch.einsum("...hqk,...khd->...qhd", torch.softmax(weights, -1), v)


def fairseq(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(length, batch, heads * dim), heads folded into the batch for bmm."""
    t, b, _ = q.shape
    q = (q * DIM**-0.5).contiguous().view(t, b * HEADS, DIM).transpose(0, 1)
    k = k.contiguous().view(-1, b * HEADS, DIM).transpose(0, 1)
    v = v.contiguous().view(-1, b * HEADS, DIM).transpose(0, 1)
    attn_weights = torch.bmm(q, k.transpose(1, 2))
    attn = torch.bmm(F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights), v)
    return attn.transpose(0, 1).contiguous().view(t, b, HEADS * DIM)


def diffusers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """baddbmm into an empty tensor with beta=0."""
    scores = torch.baddbmm(
        torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype),
        q,
        k.transpose(-1, -2),
        beta=0,
        alpha=DIM**-0.5,
    )
    return torch.bmm(scores.softmax(dim=-1), v)


def keys_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-1 and Megatron: k arrives as (batch, heads, dim, length)."""
    k = k.permute(0, 1, 3, 2)
    w = torch.matmul(q, k) / float(DIM) ** 0.5
    return torch.matmul(torch.nn.Softmax(dim=-1)(w), v)


def broadcast_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No matrix product at all: multiplied and summed."""
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / ROOT
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def keys_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores as keys by queries, softmax over the rows, transposed for the values."""
    scores = k @ q.transpose(-2, -1) * DIM**-0.5
    return scores.softmax(dim=-2).transpose(-2, -1) @ v


def values_on_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels before tokens, as in LeViT and the attention blocks of image autoencoders."""
    q, k, v = q.mT, k.mT, v.mT
    attn = (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(dim=-1)
    return v @ attn.transpose(-2, -1)


def exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax written out, the division left to the end."""
    scores = q @ k.mT / ROOT
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (e @ v) / e.sum(dim=-1, keepdim=True)


def course(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / k.shape[-1] ** 0.5
    e = (scores - torch.max(scores, dim=-1, keepdim=True).values).exp()
    return torch.einsum("bhqk,bhkd->bhqd", e / torch.sum(e, dim=-1, keepdim=True), v)


def with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """output_attentions=True: the probabilities are a result too."""
    probs = torch.softmax(q @ k.transpose(-2, -1) * DIM**-0.5, dim=-1)
    return probs @ v, probs


def log_space(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


def _sdpa(scale: float | None = None) -> Callable[..., Tensor]:
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale)


def _llama(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _buffer(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1 / float(m.scale_attn))


def _cosine(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = F.normalize(q, dim=-1) * m.logit_scale.exp()
    return F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, scale=1.0)


def _normed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = F.rms_norm(q, (DIM,), m.q_norm.weight, 1e-6)
    return F.scaled_dot_product_attention(q, F.rms_norm(k, (DIM,), m.k_norm.weight, 1e-6), v)


def _flax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _fairseq(m: Any, *qkv: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, DIM)).permute(1, 2, 0, 3) for x in qkv)
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(-2)


def _left(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).mT


def _with_weights(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    probs = F.scaled_dot_product_attention(q, k, torch.eye(k.shape[-2]).expand(*k.shape[:2], -1, -1))
    return F.scaled_dot_product_attention(q, k, v), probs


def attention(make: Callable[[], nn.Module], name: str, **given: Any) -> Spelling:
    """A record of self-attention lengths, the scale 1/sqrt(d) unless said."""
    said: dict[str, Any] = dict(scaled=(0, 1), magnitudes=(1.0, 1e-2, 4.0, 0.0), reference=_sdpa())
    said |= dict(facts={"scale": 1 / ROOT}, inputs=lambda: (heads(), heads(), heads()))
    return Spelling(kind="attention", name="attention_" + name, make=make, **(said | given))


def of(function: Callable[..., Outputs], **given: Any) -> Spelling:
    return attention(lambda: Stateless(function), named(function), **given)


def _cross() -> tuple[Tensor, ...]:
    return heads(length=4), heads(length=7), heads(length=7, dim=6)


def _length_first() -> tuple[Tensor, ...]:
    return tuple(torch.randn(n, 2, HEADS * DIM) for n in (5, 7, 7))


def _three_axes() -> tuple[Tensor, ...]:
    return tuple(heads(length=n).flatten(0, 1) for n in (5, 7, 7))


SPELLINGS: tuple[Spelling, ...] = (
    of(fused),
    of(fused_own_scale, reference=_sdpa(0.21), facts={"scale": 0.21}),
    of(bert),
    of(llama, dtype=torch.bfloat16, reference=_llama),
    of(scale_on_queries),
    of(scale_divides_queries, dtype=torch.float16),
    of(scale_on_keys),
    of(scale_on_both),
    of(scale_from_tensor, inputs=_cross),
    of(no_scale, reference=_sdpa(1.0), facts={"scale": 1.0}),
    attention(
        ScaleBuffer, "scale_buffer", reference=_buffer, facts={"scale": 1 / 2.75}, dtype=torch.bfloat16
    ),
    attention(LogitScale, "logit_scale", also={"l2_norm": 2}, facts={}, reference=_cosine),
    attention(QueriesNormed, "queries_normed", also={"rms_norm": 2}, reference=_normed),
    of(lucidrains),
    of(flax, reference=_flax),
    of(fairseq, reference=_fairseq, inputs=_length_first),
    of(diffusers, inputs=_three_axes),
    of(keys_transposed, inputs=_cross),
    of(broadcast_products, inputs=_cross),
    of(keys_in_rows, inputs=_cross),
    of(values_on_the_left, reference=_left),
    of(exponentials),
    of(course),
    of(with_weights, reference=_with_weights, or_kinds=("softmax",)),
    of(log_space),
)
