"""Hadamard matrices of four circulants, for sizes that no finite field reaches.

Four sequences a, b, c, d of +1 and -1 whose periodic autocorrelations add up to zero at every shift give a matrix of
size 4 n (Goethals & Seidel 1967). Those of length 23, 29, 39 and 43 were found by matching pairs among the symmetric
ones (Williamson 1944), or among those that a multiplier of order three leaves alone (Dokovic 1990); those of length 47
and 59 come from Turyn-type sequences of length 16 and 20 (Turyn 1974), found by a search from both ends inwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FOUR = {
    23: "+--++-+-+-++++-+-+-++-- +--+-+-++++++++++-+-+-- +++---++--++++--++---++ -++-++---++++++---++-++",
    29: "++-+++--+-++------++-+--+++-+ +++-+---++++-++++-++++---+-++ "
        "-++---++--+-++++++-+--++---++ ++-+-+++-++-+----+-++-+++-+-+",
    39: "+++--++------+++++++--++----++-++--+--+ +--+--++++-++-++-++++--+---+++++--+++++ "
        "+++--++++--+++-++-+-+-+---+---+-+-+-++- ++++-+++++-+--+++-+-+-+----+-+--+-++-+-",
    43: "++++--++-++++---+++---++--++-+---+--++----+ +--+++-+++++---+++++--+++---+-+------+-+--+ "
        "++-+-++-+-+---+-+++++-+-----+-+++-+-+--+-+- ++-+--+--+++-++-++++++++-+--+--++-+++-++++-",
}  # fmt: skip
_TURYN = {
    47: "++-+-++++--+---- +----+-+--+--+-- --+--++---+++-+- ++---+-++++++-+",
    59: "+-----+--------++-+- +--+-++-++--++--++-- ---+-+-++++---++-++- +-+---+-++++-++++--",
}


def four_circulants(n: int) -> Tensor | None:
    """The n x n matrix of four sequences of length n / 4, where they are known here."""
    length = n // 4
    if n % 4 or (length not in _FOUR and length not in _TURYN):
        return None
    sequences = _signs(_FOUR[length]) if length in _FOUR else _turyn(*_signs(_TURYN[length]))
    a, b, c, d = (_circulant(s) for s in sequences)
    rows = (
        (a, _turned(b), _turned(c), _turned(d)),
        (-_turned(b), a, _turned(d.T), -_turned(c.T)),
        (-_turned(c), -_turned(d.T), a, _turned(b.T)),
        (-_turned(d), _turned(c.T), -_turned(b.T), a),
    )
    return torch.cat([torch.cat(row, 1) for row in rows])


def _signs(text: str) -> list[Tensor]:
    return [torch.tensor([1 if sign == "+" else -1 for sign in word], dtype=torch.int8) for word in text.split()]


def _turyn(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> list[Tensor]:
    """Sequences of length 3 n - 1 from Turyn-type ones of lengths n, n, n, n - 1, by T-sequences of disjoint support."""
    none, early = torch.zeros_like(x), torch.zeros(len(z) + len(w), dtype=torch.int8)
    first, second = torch.cat([z, torch.zeros_like(w)]), torch.cat([torch.zeros_like(z), w])
    t = [torch.cat([first, none]), torch.cat([second, none])]
    t += [torch.cat([early, (x + y) // 2]), torch.cat([early, (x - y) // 2])]
    signs = ((1, 1, 1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1), (-1, 1, -1, 1))
    return [sum((s * part for s, part in zip(row, t, strict=True)), start=torch.zeros_like(t[0])) for row in signs]


def _circulant(row: Tensor) -> Tensor:
    return torch.stack([row.roll(i) for i in range(len(row))])


def _turned(circulant: Tensor) -> Tensor:
    """C R, with R ones on the other diagonal."""
    return circulant.flip(1)
