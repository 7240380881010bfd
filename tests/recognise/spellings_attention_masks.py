"""Attention under masks: boolean, additive, causal, banded, with biases of position."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import Spelling
from .spellings_attention import DIM, HEADS, ROOT, attention, heads, of

LENGTH = 6


# -- a mask that is given ------------------------------------------------------------------------------------


def fused_boolean(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def fused_additive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def annotated_transformer(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """masked_fill(mask == 0, -1e9)."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(keep == 0, -1e9)
    return torch.matmul(scores.softmax(dim=-1), v)


def lowest_finite(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """DistilBERT and lucidrains: the lowest number of the dtype."""
    sim = torch.einsum("bhid,bhjd->bhij", q, k) * DIM**-0.5
    sim = sim.masked_fill(~keep, -torch.finfo(sim.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)


def masked_fill_in_place(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """XLM."""
    scores = torch.matmul(q / ROOT, k.transpose(2, 3))
    scores.masked_fill_((keep == 0).expand_as(scores), torch.finfo(scores.dtype).min)
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def where_infinity(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    return torch.where(keep, scores, float("-inf")).softmax(-1) @ v


def padding_to_remove(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """fairseq: True says ignore, (batch, keys) unsqueezed twice."""
    weights = torch.matmul(q * ROOT**-1, k.transpose(-1, -2))
    weights = weights.masked_fill(padding.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
    return F.softmax(weights, dim=-1) @ v


def extended(q: Tensor, k: Tensor, v: Tensor, ones: Tensor) -> Tensor:
    """BERT: (1 - mask) * -10000 of a mask of integers."""
    bias = (1.0 - ones[:, None, None, :].to(q.dtype)) * -10000.0
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM)
    return torch.matmul(nn.Softmax(dim=-1)(scores + bias), v)


def additive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5 + bias
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def bloom(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    """alibi.baddbmm(q, k, beta=1, alpha=1/sqrt(d))."""
    b, h, t, d = q.shape
    scores = alibi.baddbmm(
        batch1=q.reshape(-1, t, d), batch2=k.reshape(-1, t, d).mT, beta=1.0, alpha=1 / ROOT
    )
    probs = F.softmax(scores.view(b, h, t, t), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(probs.view(b * h, t, t), v.reshape(-1, t, d)).view(b, h, t, d)


# -- causal --------------------------------------------------------------------------------------------------


def fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tril_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.size(-2)
    att = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(torch.tril(torch.ones(t, t)) == 0, float("-inf"))
    return F.softmax(att, dim=-1) @ v


def triu_boolean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT / ROOT).masked_fill(future, float("-inf")).softmax(-1) @ v


def triu_additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.Transformer's square subsequent mask."""
    bias = torch.triu(torch.full((LENGTH, LENGTH), float("-inf"), dtype=q.dtype), diagonal=1)
    return torch.softmax(torch.matmul(q, k.mT).div(ROOT).add(bias), dim=-1).matmul(v)


def compared_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    scores = torch.where(i >= j, q @ k.transpose(2, 3) * DIM**-0.5, -torch.inf)
    return scores.softmax(dim=-1) @ v


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mistral: causal, and no further back than three."""
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & torch.ones(
        LENGTH, LENGTH, dtype=torch.bool
    ).triu(-2)
    return (q @ k.mT / ROOT).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v


def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, ones: Tensor) -> Tensor:
    """A causal mask and a padding mask joined, as an additive one."""
    keep = (
        torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))[None, None] & ones[:, None, None, :].bool()
    )
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (q @ k.mT * DIM**-0.5 + bias).softmax(-1) @ v


class _Bias(nn.Module):
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(9, 9)).view(1, 1, 9, 9))


class NanoGpt(_Bias):
    """A buffer larger than the sequence, cut to it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


class Gpt2(_Bias):
    """torch.where with the lowest number of the dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], DIM**0.5, dtype=q.dtype)
        causal = self.bias.bool()[:, :, : q.size(-2), : k.size(-2)]
        lowest = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(causal, weights, lowest)
        return torch.matmul(nn.functional.softmax(weights, dim=-1).type(v.dtype), v)


class Gpt1(_Bias):
    """w * b + -1e4 * (1 - b): the mask by arithmetic."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
        b = self.bias[:, :, : w.size(-2), : w.size(-1)]
        w = w * b + -1e4 * (1 - b)
        return torch.matmul(nn.functional.softmax(w, dim=-1), v)


# -- biases of position --------------------------------------------------------------------------------------


class T5(nn.Module):
    """No scale, a learned bias for each head and distance, float32 softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Embedding(2 * LENGTH, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(LENGTH)[None, :] - torch.arange(LENGTH)[:, None]
        bias = self.relative(distance + LENGTH).permute(2, 0, 1).unsqueeze(0)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        return torch.matmul(nn.functional.softmax(scores.float(), dim=-1).type_as(scores), v)


class Swin(nn.Module):
    """A table of biases looked up by relative position, then a mask of shifted windows."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, HEADS))
        index = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :] + LENGTH - 1
        self.register_buffer("index", index)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, windows: Tensor) -> Tensor:
        b = q.shape[0]
        attn = (q * DIM**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(LENGTH, LENGTH, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        n = windows.shape[0]
        attn = attn.view(b // n, n, HEADS, LENGTH, LENGTH) + windows.unsqueeze(1).unsqueeze(0)
        return attn.view(-1, HEADS, LENGTH, LENGTH).softmax(dim=-1) @ v


class Alibi(nn.Module):
    """Slopes times distances, and a causal mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125], dtype=q.dtype).view(HEADS, 1, 1)
        position = torch.arange(LENGTH)
        bias = slopes * (position[None, :] - position[:, None])
        scores = q @ k.mT / ROOT + bias
        return scores.masked_fill(position[None, :] > position[:, None], float("-inf")).softmax(-1) @ v


# -- references ----------------------------------------------------------------------------------------------


def _boolean(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def _padding(m: Any, q: Tensor, k: Tensor, v: Tensor, ones: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ones[:, None, None].bool())


def _removed(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None])


def _bloom(m: Any, q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=alibi.unflatten(0, (-1, HEADS)))


def _causal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _banded(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < 3))


def _joined(m: Any, q: Tensor, k: Tensor, v: Tensor, ones: Tensor) -> Tensor:
    causal = torch.arange(LENGTH)[:, None] >= torch.arange(LENGTH)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & ones[:, None, None].bool())


def _t5(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    bias = F.embedding(distance + LENGTH, m.relative.weight).movedim(-1, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1), scale=1.0)


def _swin(m: Any, q: Tensor, k: Tensor, v: Tensor, windows: Tensor) -> Tensor:
    bias = m.table[m.index].movedim(-1, 0) + windows[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.repeat(q.shape[0] // len(windows), 1, 1, 1))


def _alibi(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = (torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]).double()
    bias = back * torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    bias = bias.masked_fill(back > 0, float("-inf")).expand(q.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


# -- inputs --------------------------------------------------------------------------------------------------


def _qkv() -> tuple[Tensor, ...]:
    return heads(length=LENGTH), heads(length=LENGTH), heads(length=LENGTH)


def _keep() -> tuple[Tensor, ...]:
    """Which keys each query may see, never none."""
    return (*_qkv(), (torch.rand(2, 1, LENGTH, LENGTH) > 0.4) | torch.eye(LENGTH, dtype=torch.bool))


def _ones() -> tuple[Tensor, ...]:
    """1 for a token, 0 for padding."""
    return (*_qkv(), (torch.arange(LENGTH) < torch.tensor([[4], [6]])).long())


def _ignored() -> tuple[Tensor, ...]:
    return (*_qkv(), torch.arange(LENGTH) >= torch.tensor([[5], [3]]))


def _additive() -> tuple[Tensor, ...]:
    return (*_qkv(), 2 * torch.randn(2, HEADS, LENGTH, LENGTH))


def _per_head() -> tuple[Tensor, ...]:
    return (*_qkv(), torch.randn(2 * HEADS, 1, LENGTH).expand(-1, LENGTH, -1).contiguous())


def _windows() -> tuple[Tensor, ...]:
    four = tuple(heads(batch=4, length=LENGTH) for _ in range(3))
    return (*four, -100.0 * (torch.rand(2, LENGTH, LENGTH) > 0.6))


def _facts(mask: str, scale: float = 1 / ROOT) -> dict[str, object]:
    return {"scale": scale, "mask": mask}


BOOLEAN: dict[str, Any] = dict(inputs=_keep, reference=_boolean, facts=_facts("boolean"))
CAUSAL: dict[str, Any] = dict(inputs=_qkv, reference=_causal, facts=_facts("causal"))

SPELLINGS: tuple[Spelling, ...] = (
    of(fused_boolean, **BOOLEAN),
    of(fused_additive, inputs=_additive, reference=_boolean, facts=_facts("additive")),
    of(annotated_transformer, **BOOLEAN),
    of(lowest_finite, **BOOLEAN),
    of(masked_fill_in_place, **BOOLEAN),
    of(where_infinity, **BOOLEAN),
    of(padding_to_remove, inputs=_ignored, reference=_removed, facts=_facts("boolean")),
    of(extended, inputs=_ones, reference=_padding, facts=_facts("additive")),
    of(additive, inputs=_additive, reference=_boolean, facts=_facts("additive"), dtype=torch.bfloat16),
    of(bloom, inputs=_per_head, reference=_bloom, facts=_facts("additive")),
    of(fused_causal, **CAUSAL),
    of(tril_ones, **CAUSAL),
    of(triu_boolean, **CAUSAL),
    of(triu_additive, **CAUSAL),
    of(compared_positions, **CAUSAL),
    of(sliding_window, inputs=_qkv, reference=_banded, facts=_facts("boolean")),
    of(causal_and_padding, inputs=_ones, reference=_joined, facts=_facts("additive")),
    attention(NanoGpt, "nano_gpt", **CAUSAL),
    attention(Gpt2, "gpt2", **CAUSAL),
    attention(Gpt1, "gpt1", **CAUSAL),
    attention(T5, "t5", inputs=_qkv, reference=_t5, facts=_facts("additive", 1.0)),
    attention(Swin, "swin", inputs=_windows, reference=_swin, facts=_facts("additive")),
    attention(Alibi, "alibi", inputs=_qkv, reference=_alibi, facts=_facts("additive")),
)
