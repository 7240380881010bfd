"""Whatever fires through `permute` fires through every other spelling of it: one model with a site for each pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from tests.support import assert_same_function, image, randomised

WIDTH, HEADS, LENGTH = 8, 2, 6

Swap = Callable[[Tensor, int, int], Tensor]
"""Exchanges two axes."""


def permute(x: Tensor, a: int, b: int) -> Tensor:
    return x.permute(exchanged(list(range(x.dim())), a, b))


def movedim(x: Tensor, a: int, b: int) -> Tensor:
    return x.movedim((a, b), (b, a))


def moveaxis(x: Tensor, a: int, b: int) -> Tensor:
    return x.moveaxis(max(a, b), min(a, b)) if abs(a - b) == 1 else x.moveaxis((a, b), (b, a))


def matrix(x: Tensor, a: int, b: int) -> Tensor:
    """`mT`, to which other axes are brought and brought back."""
    if {a, b} == {x.dim() - 2, x.dim() - 1}:
        return x.mT
    return x.movedim((a, b), (-2, -1)).mT.movedim((-2, -1), (a, b))


def adjoint(x: Tensor, a: int, b: int) -> Tensor:
    return x.adjoint() if {a, b} == {x.dim() - 2, x.dim() - 1} else x.swapdims(a, b)


def einsum(x: Tensor, a: int, b: int) -> Tensor:
    letters = list("ijkl"[: x.dim()])
    after = exchanged([*letters], a, b)
    return torch.einsum(f"{''.join(letters)}->{''.join(after)}", x)


def rearranged(x: Tensor, a: int, b: int) -> Tensor:
    """As einops spells it: reshape, permute, reshape."""
    apart = x.reshape(1, *x.shape)
    turned = apart.permute([0, *(1 + i for i in exchanged(list(range(x.dim())), a, b))])
    return turned.reshape(turned.shape[1:])


def exchanged(items: list[Any], a: int, b: int) -> list[Any]:
    items[a], items[b] = items[b], items[a]
    return items


SPELLINGS: dict[str, Swap] = {
    "permute": permute,
    "transpose": lambda x, a, b: x.transpose(a, b),
    "swapaxes": lambda x, a, b: x.swapaxes(a, b),
    "swapdims": lambda x, a, b: x.swapdims(a, b),
    "movedim": movedim,
    "moveaxis": moveaxis,
    "mT": matrix,
    "adjoint": adjoint,
    "einsum": einsum,
    "rearranged": rearranged,
}
PASSES = (
    "fold_batch_norm", "fold_batch_norm_forward", "fold_norm_affine", "layer_norm_to_rms_norm", "fold_scalars",
    "fold_layer_scale", "fold_value_bias", "merge_linears",
)  # fmt: skip


class Everything(nn.Module):
    """(batch, channels, length) -> one result for each kind of site."""

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self.swap = swap
        self.before, self.norm_behind = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.norm_first, self.behind = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.writer, self.norm, self.reader = nn.Conv1d(WIDTH, WIDTH, 1), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.final, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scaled, self.after_scale = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH, 1))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            self.norm_behind(self.last(self.before(self.last(x)))),
            self.behind(self.last(self.norm_first(x))),
            self.stream(x),
            self.after_scale(self.last(self.last(self.scaled(self.last(x))) * 0.5)),
            x + self.last(self.layer(self.last(x))) * self.gain,
            self.attend(self.last(x)),
        )

    def last(self, x: Tensor) -> Tensor:
        return self.swap(x, 1, 2)

    def stream(self, x: Tensor) -> Tensor:
        """Written with the channels first, normalised and read with them last."""
        h = self.writer(x)
        h = h + self.last(self.reader(self.last(self.last(self.norm(self.last(h))))))
        return self.head(self.last(self.last(self.final(self.last(h)))))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (self.swap(p(x).reshape(*x.shape[:2], HEADS, -1), 1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(self.swap(mixed, 1, 2).reshape(x.shape))


@cache
def fired(spelling: str) -> dict[str, int]:
    """How often each pass fires in the model so spelt, which stays the same function."""
    model = randomised(Everything(SPELLINGS[spelling]))
    result = normfuse.optimize(model, (image(2, WIDTH, LENGTH),), passes=list(PASSES), dynamic_shapes=None)
    assert_same_function(result)
    return dict(result.report.fired)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_site_behind_a_permute(name: str) -> None:
    assert fired("permute").get(name, 0) > 0


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "permute"])
def test_what_fires_through_permute_fires_through(spelling: str) -> None:
    assert fired(spelling) == fired("permute")
