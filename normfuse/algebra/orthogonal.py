"""Orthogonal matrices: Hadamard of every size up to 256, and of most others; random ones, and the test."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product

import torch
from torch import Tensor

from normfuse.algebra.circulants import four_circulants


@lru_cache(maxsize=32)
def hadamard(n: int) -> Tensor | None:
    """An n x n matrix H of +1 and -1 (int8) with H H^T = n I, or None where no construction here reaches n.

    Sylvester 1867 (doubling), Paley 1933 (both kinds, over every finite field), four circulants of 23, 29, 39, 43, 47
    and 59, and the Kronecker products of all these.
    """
    if n in (1, 2):
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:n, :n].clone()
    if n < 4 or n % 4:
        return None
    for build in (_product, _paley_first, _paley_second, four_circulants):
        found = build(n)
        if found is not None:
            return found
    return None


def random_orthogonal(n: int, seed: int) -> Tensor:
    """Uniform over O(n): the Q of a normal matrix, signs settled (Mezzadri 2007, arXiv math-ph/0609050)."""
    noise = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()


def random_signs(n: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def complement_of_ones(d: int) -> Tensor:
    """d x (d-1), orthonormal columns orthogonal to (1, ..., 1): all but one of a reflector's."""
    e, one = torch.zeros(d, dtype=torch.float64), torch.full((d,), d**-0.5, dtype=torch.float64)
    e[-1] = 1.0
    v = one - e
    return (torch.eye(d, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v))[:, :-1].contiguous()


def hadamard_rotation(n: int, seed: int) -> Tensor | None:
    """diag(random signs) H / sqrt(n), or None where no H of size n is known."""
    found = hadamard(n)
    return None if found is None else random_signs(n, seed)[:, None] * found.double() * n**-0.5


def is_orthogonal(matrix: Tensor) -> bool:
    n = matrix.shape[0]
    wide = matrix.double()
    return bool((wide @ wide.T - torch.eye(n, dtype=torch.float64, device=matrix.device)).abs().max() < 1e-12 * n)


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    return torch.kron(a.contiguous(), b.contiguous())


def _paley_first(n: int) -> Tensor | None:
    """n - 1 = q a prime power, 3 mod 4:  I + [[0, 1], [-1, Q]]."""
    q = n - 1
    field = _field(q) if q % 4 == 3 else None
    if field is None:
        return None
    skew = torch.zeros(n, n, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, field
    return skew + torch.eye(n, dtype=torch.int8)


def _paley_second(n: int) -> Tensor | None:
    """n / 2 - 1 = q a prime power, 1 mod 4:  S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], S = [[0, 1], [1, Q]]."""
    q = n // 2 - 1
    field = _field(q) if q % 4 == 1 else None
    if field is None:
        return None
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0], conference[1:, 1:] = 0, field
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    eye = torch.eye(q + 1, dtype=torch.int8)
    return _kronecker(conference, plus.to(torch.int8)) + _kronecker(eye, minus.to(torch.int8))


def _product(n: int) -> Tensor | None:
    for a in range(2, int(n**0.5) + 1):
        if n % a == 0 and (first := hadamard(a)) is not None and (second := hadamard(n // a)) is not None:
            return _kronecker(first, second)
    return None


# -- finite fields: elements are polynomials, told by their coefficients, lowest first


@cache
def _field(q: int) -> Tensor | None:
    """Q[i, j] = quadratic character of (element i - element j) in the field of q elements; None if there is none."""
    p = next((p for p in range(2, q + 1) if q % p == 0), 0)
    k, rest = 0, q
    while p and rest % p == 0:
        k, rest = k + 1, rest // p
    if p < 3 or rest != 1:
        return None
    elements = [tuple(reversed(digits)) for digits in product(range(p), repeat=k)]
    modulus = _irreducible(p, k)
    squares = {_times(e, e, p, modulus) for e in elements if any(e)}
    character = torch.tensor([(1 if e in squares else -1) if any(e) else 0 for e in elements], dtype=torch.int8)
    digits = torch.tensor(elements)
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return character[(difference * p ** torch.arange(k)).sum(-1)]


def _times(a: tuple[int, ...], b: tuple[int, ...], p: int, modulus: tuple[int, ...]) -> tuple[int, ...]:
    k = len(a)
    total = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            total[i + j] = (total[i + j] + x * y) % p
    for top in range(2 * k - 2, k - 1, -1):
        for i in range(k):
            total[top - k + i] = (total[top - k + i] - total[top] * modulus[i]) % p
        total[top] = 0
    return tuple(total[:k])


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Low coefficients of a monic polynomial of degree k whose field has no zero divisors."""
    for low in product(range(p), repeat=k):
        if k == 1 or _has_no_divisors(low, p, k):
            return low
    raise AssertionError("there is an irreducible polynomial of every degree")


def _has_no_divisors(low: tuple[int, ...], p: int, k: int) -> bool:
    nonzero = [e for e in product(range(p), repeat=k) if any(e)]
    return all(any(_times(a, b, p, low)) for a in nonzero for b in nonzero)
