"""How the tensors of a row function become matrices of rows, and the gradients of matrices those of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normfuse.lower.triton.region import Argument, per_column, per_row, rows, scalar


@dataclass(frozen=True)
class Operand:
    """A tensor that broadcasts against `x`, whose rows lie along its last axis, as the smallest matrix that says it."""

    tensor: Tensor
    argument: Argument
    matrix: Tensor  # as a kernel takes it; one that is repeated may have fewer rows

    def full(self, x: Tensor) -> Tensor:
        """The matrix as the reference takes it."""
        if not self.argument.repeated or not self.argument.extent.columns:
            return self.matrix
        return self.matrix.expand(x.shape[:-1].numel() // max(self.matrix.shape[0], 1), *self.matrix.shape).flatten(0, 1)

    @classmethod
    def of(cls, name: str, tensor: Tensor, x: Tensor) -> Operand:
        columns, count = x.shape[-1], math.prod(x.shape[:-1])
        given = tensor.float() if tensor.dtype == torch.float64 != x.dtype else tensor  # never wider than the statistics
        if tensor.shape == x.shape:
            return cls(tensor, rows(name, given.dtype), given.reshape(count, columns))
        if tensor.numel() == 1:
            return cls(tensor, scalar(name, given.dtype), given.reshape(1, 1))
        if tensor.numel() == tensor.shape[-1]:
            return cls(tensor, per_column(name, given.dtype), given.reshape(1, columns))
        if tensor.shape[-1] == 1:
            repeated = replace(per_row(name, given.dtype), repeated=True)
            return cls(tensor, repeated, given.expand(*x.shape[:-1], 1).reshape(count, 1))
        own = next(size for size in range(tensor.dim() + 1) if size == tensor.dim() or tensor.shape[size] != 1)
        said = given if tensor.shape[own:] == x.shape[x.dim() - tensor.dim() + own :] else given.expand(x.shape)
        return cls(tensor, replace(rows(name, given.dtype), repeated=True), said.reshape(-1, columns))

    def gradient(self, matrix: Tensor, x: Tensor) -> Tensor:
        """The tensor's gradient from the matrix's: what was repeated is summed."""
        given = self.argument.extent
        if not given.rows:
            return matrix.reshape(self.tensor.shape).to(self.tensor.dtype)
        full = matrix.reshape(*x.shape[:-1], matrix.shape[-1])
        return full.sum_to_size(self.tensor.shape).to(self.tensor.dtype)
