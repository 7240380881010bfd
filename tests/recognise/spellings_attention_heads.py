"""Attention with grouped heads, in modules with their projections, over images, channels, by one query."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import Spelling, rows
from .spellings_attention import DIM, ROOT, attention, heads, of

QUERIES, GROUPS, WIDTH = 6, 2, 24

# -- grouped heads -------------------------------------------------------------------------------------------


def fused_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = torch.repeat_interleave(k, dim=1, repeats=q.size(1) // k.size(1))
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    return (q @ k.mT / ROOT).softmax(-1) @ v


def _repeat_kv(x: Tensor, n: int) -> Tensor:
    batch, groups, length, dim = x.shape
    x = x[:, :, None, :, :].expand(batch, groups, n, length, dim)
    return x.reshape(batch, groups * n, length, dim)


def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers: expand and reshape, then the usual causal attention in bfloat16."""
    k, v = _repeat_kv(k, q.shape[1] // k.shape[1]), _repeat_kv(v, q.shape[1] // v.shape[1])
    weights = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
    future = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    weights = weights + future[None, None]
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


def queries_in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries as (batch, groups, per group, length, dim) against keys with an axis of one."""
    b, h, t, d = q.shape
    g = k.shape[1]
    scores = torch.matmul(q.view(b, g, h // g, t, d), k.unsqueeze(2).transpose(-1, -2)) / math.sqrt(d)
    return torch.matmul(scores.softmax(-1), v.unsqueeze(2)).reshape(b, h, t, d)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """t5x and Gemma in JAX: BTKGH,BSKH->BKGTS."""
    b, h, t, d = q.shape
    q = q.transpose(1, 2).reshape(b, t, GROUPS, h // GROUPS, d) * d**-0.5
    logits = torch.einsum("btkgh,bskh->bkgts", q, k.transpose(1, 2))
    encoded = torch.einsum("bkgts,bskh->btkgh", torch.softmax(logits, -1), v.transpose(1, 2))
    return encoded.reshape(b, t, h, d).transpose(1, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads repeated as a block: head i reads group i modulo the number of groups."""
    k, v = k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)
    return (q @ k.mT * DIM**-0.5).softmax(-1) @ v


def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Shazeer: keys and values without an axis of heads."""
    logits = torch.einsum("bhnk,bmk->bhnm", q, k) * DIM**-0.5
    return torch.einsum("bhnm,bmv->bhnv", torch.softmax(logits, dim=-1), v)


def multi_query_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPTBigCode: heads and positions of the queries in one axis."""
    b, h, t, d = q.shape
    scores = torch.bmm(q.reshape(b, h * t, d), k.transpose(1, 2)) / ROOT
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d)


# -- modules with projections --------------------------------------------------------------------------------


class _Projected(nn.Module):
    heads = 3

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class Vit(_Projected):
    """timm: one projection, unbound."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class MinGpt(_Projected):
    """Karpathy's: split, viewed, causal by a buffer, dropout modules in eval mode."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(c, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class OneHeadAtATime(nn.Module):
    """Lecture code: a list of heads, each with its own projections, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.ModuleList(nn.Linear(WIDTH, DIM, bias=False) for _ in range(3))
        self.k = nn.ModuleList(nn.Linear(WIDTH, DIM, bias=False) for _ in range(3))
        self.v = nn.ModuleList(nn.Linear(WIDTH, DIM, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            wei = q(x) @ k(x).transpose(-2, -1) * DIM**-0.5
            wei = wei.masked_fill(torch.tril(torch.ones(x.shape[1], x.shape[1])) == 0, float("-inf"))
            out.append(F.softmax(wei, dim=-1) @ v(x))
        return torch.cat(out, dim=-1)


class _Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 3, batch_first=True)


class TorchModule(_Multihead):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attn(x, memory, memory, need_weights=False)[0]


class TorchModuleWithWeights(_Multihead):
    """The other path of the module: bmm, softmax, bmm, the mean over heads returned."""

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attn(x, memory, memory)
        return y, weights


class NonLocal(nn.Module):
    """Image autoencoders: 1x1 convolutions, b,hw,c times b,c,hw, the probabilities transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.q(x).reshape(b, c, h * w).permute(0, 2, 1)
        k = self.k(x).reshape(b, c, h * w)
        w_ = torch.bmm(q, k) * (int(c) ** (-0.5))
        w_ = torch.nn.functional.softmax(w_, dim=2).permute(0, 2, 1)
        return x + torch.bmm(self.v(x).reshape(b, c, h * w), w_).reshape(b, c, h, w)


class XCiT(nn.Module):
    """Between channels: unit queries and keys, a temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.temperature = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(1 + torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return (attn @ v).permute(0, 3, 1, 2).reshape(b, n, c)


class LatentPool(nn.Module):
    """Attention pooling: a learned query for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.kv = nn.Parameter(torch.randn(1, 3, 1, DIM)), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        k, v = self.kv(x).reshape(b, n, 2, 3, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (self.latent.expand(b, -1, -1, -1) * DIM**-0.5) @ k.transpose(-2, -1)
        return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, c)


# -- references ----------------------------------------------------------------------------------------------


def _grouped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _grouped_causal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _tiled(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    order = torch.arange(QUERIES) % GROUPS
    return F.scaled_dot_product_attention(q, k[:, order], v[:, order])


def _one_key_head(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k[:, None].expand(-1, QUERIES, -1, -1), v[:, None].expand(-1, QUERIES, -1, -1)
    )


def _split(projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    return tuple(z.unflatten(-1, (3, -1)).transpose(1, 2) for z in projected.chunk(parts, -1))


def _projected(causal: bool) -> Any:
    def reference(m: Any, x: Tensor) -> Tensor:
        q, k, v = _split(m.qkv(x), 3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return m.proj(y.transpose(1, 2).flatten(-2))

    return reference


def _each(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.stack([f(x) for f in fs], 1) for fs in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def _multihead(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    wq, wk, wv = m.attn.in_proj_weight.chunk(3)
    bq, bk, bv = m.attn.in_proj_bias.chunk(3)
    pairs = ((x, wq, bq), (memory, wk, bk), (memory, wv, bv))
    q, k, v = (F.linear(s, w, b).unflatten(-1, (3, -1)).transpose(1, 2) for s, w, b in pairs)
    return m.attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def _multihead_weights(m: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    wq, wk, _ = m.attn.in_proj_weight.chunk(3)
    bq, bk, _ = m.attn.in_proj_bias.chunk(3)
    q, k = (
        F.linear(s, w, b).unflatten(-1, (3, -1)).transpose(1, 2)
        for s, w, b in ((x, wq, bq), (memory, wk, bk))
    )
    return _multihead(m, x, memory), torch.softmax(q @ k.mT / ROOT, -1).mean(1)


def _non_local(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).flatten(2).mT for f in (m.q, m.k, m.v))
    return x + F.scaled_dot_product_attention(q, k, v).mT.view_as(x)


def _xcit(m: Any, x: Tensor) -> Tensor:
    q, k, v = (z.mT for z in _split(m.qkv(x), 3))
    q, k = F.normalize(q, dim=-1) * m.temperature, F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).permute(0, 3, 1, 2).flatten(-2)


def _pool(m: Any, x: Tensor) -> Tensor:
    k, v = _split(m.kv(x), 2)
    return F.scaled_dot_product_attention(m.latent.expand(len(x), -1, -1, -1), k, v).flatten(1)


# -- inputs --------------------------------------------------------------------------------------------------


def _gqa() -> tuple[Tensor, ...]:
    return heads(count=QUERIES), heads(count=GROUPS), heads(count=GROUPS)


def _mqa() -> tuple[Tensor, ...]:
    return heads(count=QUERIES), heads(count=1, length=7)[:, 0], heads(count=1, length=7)[:, 0]


def _stream() -> tuple[Tensor, ...]:
    return (rows(2, 5, WIDTH).clamp(-4, 4),)


def _streams() -> tuple[Tensor, ...]:
    return rows(2, 5, WIDTH).clamp(-4, 4), rows(2, 7, WIDTH).clamp(-4, 4)


G: dict[str, Any] = dict(inputs=_gqa, reference=_grouped, facts={"scale": 1 / ROOT, "groups": GROUPS})
M: dict[str, Any] = dict(inputs=_mqa, reference=_one_key_head, facts={"scale": 1 / ROOT, "groups": 1})
S: dict[str, Any] = dict(inputs=_stream, scaled=(0,), magnitudes=(1.0, 1e-2))

SPELLINGS: tuple[Spelling, ...] = (
    of(fused_grouped, **G),
    of(repeat_interleave, **G),
    of(repeat_kv, **(G | dict(reference=_grouped_causal, dtype=torch.bfloat16))),
    of(queries_in_groups, **G),
    of(grouped_einsum, **G),
    of(tiled, inputs=_gqa, reference=_tiled),
    of(multi_query, **M),
    of(multi_query_folded, **M),
    attention(Vit, "vit", reference=_projected(False), **S),
    attention(MinGpt, "min_gpt", reference=_projected(True), **S),
    attention(OneHeadAtATime, "one_head_at_a_time", count=3, reference=_each, **S),
    attention(TorchModule, "torch_module", reference=_multihead, **(S | dict(inputs=_streams))),
    attention(
        TorchModuleWithWeights,
        "torch_module_with_weights",
        or_kinds=("softmax",),
        reference=_multihead_weights,
        **(S | dict(inputs=_streams)),
    ),
    attention(
        NonLocal,
        "non_local",
        reference=_non_local,
        **(S | dict(inputs=lambda: (rows(2, DIM, 3, 4).clamp(-4, 4),))),
    ),
    attention(XCiT, "xcit", also={"l2_norm": 2}, facts={}, reference=_xcit, **S),
    attention(LatentPool, "latent_pool", reference=_pool, **S),
)
