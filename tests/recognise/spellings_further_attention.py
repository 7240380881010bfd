"""Attention as it stands in further code: ESM, Whisper, Megatron, T5X, Restormer, ADM; and queries that see nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import Reference, Spelling, Stateless, gain, named, shift

HEADS, LENGTH, DEPTH = 4, 6, 8
WIDTH = HEADS * DEPTH
LOWEST = torch.finfo(torch.float32).min


def _heads() -> tuple[Tensor, ...]:
    return tuple(0.7 * torch.randn(2, HEADS, LENGTH, DEPTH) + 0.2 for _ in range(3))


def _tokens() -> tuple[Tensor, ...]:
    return (0.7 * torch.randn(2, LENGTH, WIDTH) + 0.2,)


def _padded() -> tuple[Tensor, ...]:
    """The first places of the first row are padding: causally masked, its first queries see nothing."""
    return (*_heads(), torch.arange(LENGTH) >= torch.tensor([[2], [0]]))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / DEPTH**0.5


def _causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


# -- modules -------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return q, k, v


class Esm(Packed):
    """Length first, heads folded into the batch, the queries scaled."""

    def forward(self, x: Tensor) -> Tensor:
        n, b, c = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.contiguous().view(n, b * HEADS, DEPTH).transpose(0, 1) for t in (q * DEPTH**-0.5, k, v))
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1, dtype=torch.float32).type_as(q)
        return torch.bmm(weights, v).transpose(0, 1).contiguous().view(n, b, c)


class Whisper(Packed):
    """d ** -0.25 on both sides, a slice of a stored triangle of minus infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(16, 16).fill_(-math.inf).triu_(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, scale = x.shape[1], DEPTH**-0.25
        q, k, v = (t.view(*t.shape[:2], HEADS, -1) for t in self.qkv(x).chunk(3, -1))
        scores = (q.permute(0, 2, 1, 3) * scale) @ (k.permute(0, 2, 3, 1) * scale)
        weights = F.softmax((scores + self.mask[:n, :n]).float(), dim=-1).to(q.dtype)
        return (weights @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).flatten(start_dim=2)


class MultiQuery(nn.Module):
    """lucidrains: one head of keys and values, the largest score subtracted, the lowest number as the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, DEPTH).transpose(1, 2) * DEPTH**-0.5
        k, v = self.kv(x).split([DEPTH, DEPTH], -1)
        scores = torch.einsum("bhid,bjd->bhij", q, k)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.finfo(scores.dtype).max)
        weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        return torch.einsum("bhij,bjd->bhid", weights, v).transpose(1, 2).reshape(b, n, WIDTH)


class NullKeys(Packed):
    """One learned key and value in front of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.null = shift(2, DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parted(x)
        first_k, first_v = (t.expand(x.shape[0], HEADS, 1, DEPTH) for t in self.null.unbind(0))
        k, v = torch.cat((first_k, k), -2), torch.cat((first_v, v), -2)
        return (torch.einsum("bhid,bhjd->bhij", q, k) * DEPTH**-0.5).softmax(-1) @ v


class RelativeTable(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(33, HEADS)

    def bias(self, n: int) -> Tensor:
        i = torch.arange(n)
        return self.table((i[None] - i[:, None]).clamp(-16, 16) + 16).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parted(x)
        return ((q * DEPTH**-0.5) @ k.transpose(-2, -1) + self.bias(x.shape[1])).softmax(-1) @ v


class Diffusion(nn.Module):
    """ADM: channels first, q, k and v side by side in each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        qkv = self.qkv(x.reshape(b, c, -1))
        length = qkv.shape[-1]
        q, k, v = qkv.reshape(b * HEADS, 3 * DEPTH, length).split(DEPTH, dim=1)
        scale = 1 / math.sqrt(math.sqrt(DEPTH))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        return torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, *spatial)


class LearnedTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = shift(1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2)) * self.log.exp()).softmax(-1) @ v


class Restormer(nn.Module):
    """Between channels: queries and keys of unit length, a temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = gain(HEADS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b, HEADS, c // 3 // HEADS, h * w) for t in x.chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return (((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1) @ v).reshape(b, c // 3, h, w)


# -- functions -----------------------------------------------------------------------------------------------


def megatron(q: Tensor, k: Tensor, v: Tensor, ignored: Tensor) -> Tensor:
    n, b, h, d = q.shape
    empty = torch.zeros(b * h, n, n, dtype=q.dtype)
    q, k, v = (t.reshape(n, b * h, d).transpose(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(d)).view(b, h, n, n)
    weights = F.softmax(scores.masked_fill(ignored, -10000.0), dim=-1)
    out = torch.bmm(weights.view(b * h, n, n), v).view(b, h, n, d)
    return out.permute(2, 0, 1, 3).contiguous().view(n, b, h * d)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bthgd,bshd->bhgts", q, k) * DEPTH**-0.5).softmax(-1)
    return torch.einsum("bhgts,bshd->bthgd", weights, v)


def t5x(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q / math.sqrt(q.shape[-1]), k)
    weights = F.softmax(torch.where(keep[:, None, None], scores, torch.finfo(scores.dtype).min), -1)
    return torch.einsum("...hqk,...khd->...qhd", weights, v).transpose(1, 2)


def original_gpt2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scores * b - 1e10 * (1 - b)"""
    scores = q @ k.transpose(-1, -2) * torch.rsqrt(torch.tensor(float(v.shape[-1])))
    b = torch.tril(torch.ones(scores.shape[-2:], dtype=q.dtype))
    return torch.softmax(scores * b - 1e10 * (1 - b), -1) @ v


def alibi_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    slopes = torch.tensor([2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0]).view(1, HEADS, 1, 1)
    scores = _scores(q, k) - (i[:, None] - i[None]).abs() * slopes
    return scores.masked_fill(i[None] > i[:, None], -math.inf).softmax(-1) @ v


def window_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    near = (i[:, None] >= i[None]) & (i[:, None] - i[None] < 3)
    return F.softmax(torch.where(near, q @ k.mT * 0.3, torch.finfo(q.dtype).min), -1) @ v


def exponential_of_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(_scores(q, k), -1).exp() @ v


def keys_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.matmul(k, q.transpose(-1, -2)) / DEPTH**0.5).softmax(dim=-2)
    return torch.matmul(weights.transpose(-1, -2), v)


def products_and_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * DEPTH**-0.5).softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def divided_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    weights = torch.exp(scores - scores.max(-1, keepdim=True)[0])
    return weights @ v / weights.sum(-1, keepdim=True)


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhji", q, k).div(math.sqrt(DEPTH))
    return torch.einsum("bhji,bhjd->bhid", scores.softmax(2), v)


# -- some queries see nothing: not a number, or all alike, as it was written -----------------------------------


def infinity_filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A query that sees nothing is not a number."""
    return _scores(q, k).masked_fill(~(keep[:, None, None] & _causal()), -math.inf).softmax(-1) @ v


def infinity_filled_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = _scores(q, k).masked_fill(~_causal(), -math.inf)
    return scores.masked_fill(~keep[:, None, None], -math.inf).softmax(-1) @ v


def logarithm_of_the_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (_scores(q, k) + (keep[:, None, None] & _causal()).to(q.dtype).log()).softmax(-1) @ v


def lowest_then_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Hugging Face's GPT-2: filled causally, then the padding added."""
    scores = torch.where(_causal(), _scores(q, k), LOWEST)
    return (scores + (1.0 - keep[:, None, None].to(q.dtype)) * LOWEST).softmax(-1) @ v


def padding_then_lowest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    added = (1.0 - keep[:, None, None].to(q.dtype)) * LOWEST
    return torch.where(_causal(), _scores(q, k) + added, LOWEST).softmax(-1) @ v


def alibi_then_filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = _scores(q, k) + 0.3 * torch.arange(LENGTH, dtype=q.dtype)
    return scores.masked_fill(~(keep[:, None, None] & _causal()), -1e9).softmax(-1) @ v


def kept_above_the_lowest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """XGLM: no sum below the lowest number, so that a query that sees nothing sees all alike."""
    added = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -math.inf)[:, None, None]
    added = added.masked_fill(~_causal(), -math.inf)
    return torch.maximum(_scores(q, k) + added, torch.tensor(LOWEST, dtype=q.dtype)).softmax(-1) @ v


# -- references ----------------------------------------------------------------------------------------------


def _sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _sdpa_causal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _length_first(m: Any, x: Tensor) -> Tensor:
    out = _sdpa(m, *m.parted(x.transpose(0, 1)))
    return out.transpose(1, 2).flatten(2).transpose(0, 1)


def _packed_causal(m: Any, x: Tensor) -> Tensor:
    return _sdpa_causal(m, *m.parted(x)).transpose(1, 2).flatten(2)


def _multi_query(m: Any, x: Tensor) -> Tensor:
    q = m.q(x).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)
    k, v = (t[:, None].expand(-1, HEADS, -1, -1) for t in m.kv(x).chunk(2, -1))
    return _sdpa_causal(m, q, k, v).transpose(1, 2).flatten(2)


def _null(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parted(x)
    first = m.null[:, None, None, None].expand(2, x.shape[0], HEADS, 1, DEPTH)
    return _sdpa(m, q, torch.cat((first[0], k), 2), torch.cat((first[1], v), 2))


def _relative(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*m.parted(x), attn_mask=m.bias(x.shape[1]))


def _diffusion(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x.flatten(2)).unflatten(1, (HEADS, 3, DEPTH)).transpose(-1, -2).unbind(2)
    return _sdpa(m, q, k, v).transpose(-1, -2).reshape(x.shape)


def _temperature(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q * m.log.exp(), k, v, scale=1.0)


def _restormer(m: Any, x: Tensor) -> Tensor:
    q, k, v = x.unflatten(1, (3, HEADS, -1)).flatten(4).unbind(1)
    q, k = F.normalize(q, dim=-1) * m.temperature, F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).flatten(1, 2).unflatten(-1, x.shape[2:])


def _megatron(m: Any, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor) -> Tensor:
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~ignored).permute(2, 0, 1, 3).flatten(2)


def _grouped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.transpose(1, 2).repeat_interleave(q.shape[3], 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(2, 3).transpose(1, 2), k, v)
    return out.transpose(1, 2).unflatten(2, q.shape[2:4])


def _kept(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def _written(m: Any, *given: Tensor) -> Tensor:
    """The definition: torch's operator gives zeros to a query that sees nothing, and cannot be asked."""
    result = m.function(*given)
    assert isinstance(result, Tensor)
    return result


def _masked(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    i = torch.arange(n)
    slopes = torch.tensor([2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0], dtype=q.dtype).view(1, HEADS, 1, 1)
    added = (-(i[:, None] - i[None]).abs() * slopes).masked_fill(i[None] > i[:, None], -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def _window(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=0.3)


def of(make: Any, inputs: Callable[[], tuple[Tensor, ...]], reference: Reference, **given: Any) -> Spelling:
    module = make if isinstance(make, type) else lambda: Stateless(make)
    said: dict[str, Any] = {"magnitudes": (1.0, 1e-3, 0.0)}
    return Spelling(
        name=f"further_attention_{named(make)}", make=module, kind="attention", reference=reference, inputs=inputs,
        **(said | given),
    )  # fmt: skip


def _by_length() -> tuple[Tensor, ...]:
    return tuple(0.7 * torch.randn(2, LENGTH, *lead, DEPTH) for lead in ((2, 3), (2,), (2,)))


def _length_first_heads() -> tuple[Tensor, ...]:
    q, k, v = (t.permute(2, 0, 1, 3).contiguous() for t in _heads())
    return q, k, v, (torch.rand(2, 1, LENGTH, LENGTH) > 0.7) & ~torch.eye(LENGTH, dtype=torch.bool)


NOT_FINITE = (2.0, 1e-3, 0.0)  # at 1 the tests want numbers everywhere

SPELLINGS: tuple[Spelling, ...] = (
    of(Esm, lambda: (0.7 * torch.randn(LENGTH, 2, WIDTH),), _length_first),
    of(Whisper, _tokens, _packed_causal),
    of(MultiQuery, _tokens, _multi_query),
    of(NullKeys, _tokens, _null),
    of(RelativeTable, _tokens, _relative),
    of(Diffusion, lambda: (0.7 * torch.randn(2, WIDTH, 3, 4),), _diffusion),
    of(LearnedTemperature, _heads, _temperature),
    of(Restormer, lambda: (torch.randn(2, 3 * WIDTH, 3, 4),), _restormer, also={"l2_norm": 2}, magnitudes=(1.0, 1e3)),
    of(megatron, _length_first_heads, _megatron),
    of(grouped_einsum, _by_length, _grouped),
    of(t5x, lambda: (*_heads(), torch.arange(LENGTH) < torch.tensor([[4], [6]])), _kept),
    of(original_gpt2, _heads, _sdpa_causal),
    of(alibi_causal, _heads, _masked),
    of(window_where, _heads, _window),
    of(exponential_of_logarithm, _heads, _sdpa),
    of(keys_in_rows, _heads, _sdpa),
    of(products_and_sums, _heads, _sdpa),
    of(divided_afterwards, _heads, _sdpa),
    of(einsum_keys_first, _heads, _sdpa),
    of(infinity_filled, _padded, _written, magnitudes=NOT_FINITE),
    of(infinity_filled_twice, _padded, _written, magnitudes=NOT_FINITE),
    of(logarithm_of_the_mask, _padded, _written, magnitudes=NOT_FINITE),
    of(lowest_then_padding, _padded, _written),
    of(padding_then_lowest, _padded, _written),
    of(alibi_then_filled, _padded, _written),
    of(kept_above_the_lowest, _padded, _written),
)
