"""Hadamard and other orthogonal matrices, exactly."""

from __future__ import annotations

import pytest
import torch

from normfuse.algebra.orthogonal import complement_of_ones, hadamard, hadamard_rotation, is_orthogonal, random_orthogonal

SIZES = [1, 2, *range(4, 257, 4), 384, 768, 1152, 1472, 1600, 1880, 2560]


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_times_its_transpose_is_n(n: int) -> None:
    found = hadamard(n)
    assert found is not None and found.dtype == torch.int8 and bool((found.abs() == 1).all())
    wide = found.double()  # sums of n ones are exact
    assert torch.equal(wide @ wide.T, n * torch.eye(n, dtype=torch.float64))


def test_a_large_hadamard_matrix_row_by_row() -> None:
    found = hadamard(14336)  # 512 x 28, the width of a Llama-3 MLP
    assert found is not None
    some = found[torch.arange(0, 14336, 701)]
    product = torch.cat([(some.float() @ block.float().T) for block in found.split(2048)], -1)
    rows, columns = product.nonzero(as_tuple=True)
    assert columns.tolist() == torch.arange(0, 14336, 701)[rows].tolist()
    assert bool((product[rows, columns] == 14336).all())


@pytest.mark.parametrize("n", [0, 3, 6, 18, 66, 90, 268])
def test_sizes_without_a_construction(n: int) -> None:
    assert hadamard(n) is None


def test_rotations_are_orthogonal_and_differ_by_seed() -> None:
    first, second = hadamard_rotation(24, 0), hadamard_rotation(24, 1)
    assert first is not None and second is not None
    assert is_orthogonal(first) and is_orthogonal(random_orthogonal(33, 4))
    assert not torch.equal(first, second)
    assert not is_orthogonal(first * (1 + 1e-9))


def test_the_complement_of_ones() -> None:
    basis = complement_of_ones(17)
    assert basis.shape == (17, 16)
    torch.testing.assert_close(basis.T @ basis, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(basis.sum(0), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-14)
