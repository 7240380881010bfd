"""Which elements of a result depend on which elements of the source: the axes of a norm, found by changing one element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A partition of a tensor into rows: `axes` belong to a row in full, of axis `split` a row holds `length`."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    split: int | None = None
    length: int = 0

    @property
    def size(self) -> int:
        total = self.length if self.split is not None else 1
        for axis in self.axes:
            total *= self.shape[axis]
        return total

    @property
    def parts(self) -> int:
        """Rows along the split axis."""
        return 1 if self.split is None else self.shape[self.split] // self.length

    def _layout(self) -> tuple[list[int], list[int]]:
        """The shape with the split axis in two, and the order that puts what lies within a row last."""
        sizes: list[int] = []
        outer: list[int] = []
        inner: list[int] = []
        for axis, size in enumerate(self.shape):
            if axis == self.split:
                outer.append(len(sizes))
                inner.append(len(sizes) + 1)
                sizes += [size // self.length, self.length]
            else:
                (inner if axis in self.axes else outer).append(len(sizes))
                sizes.append(size)
        return sizes, outer + inner

    def rows(self, x: Tensor) -> Tensor:
        sizes, order = self._layout()
        return x.reshape(sizes).permute(order).reshape(-1, self.size)

    def back(self, rows: Tensor) -> Tensor:
        sizes, order = self._layout()
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return rows.reshape([sizes[i] for i in order]).permute(inverse).reshape(self.shape)


def changed_rows(before: Tensor, after: Tensor, position: int) -> Rows | None:
    """The partition that a change of the source's element at flat `position` shows, if it shows one."""
    scale = float(before.abs().amax())
    mask = (after - before).abs() > 1e-14 * scale
    return _rows_of(mask, _coordinates(position, tuple(before.shape)))


def _coordinates(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    found: list[int] = []
    for size in reversed(shape):
        found.append(position % size)
        position //= size
    return tuple(reversed(found))


def _rows_of(mask: Tensor, at: tuple[int, ...]) -> Rows | None:
    total = int(mask.sum())
    if total == 0:
        return None
    shape = tuple(mask.shape)
    axes: list[int] = []
    split: tuple[int, int] | None = None
    count = 1
    for axis, size in enumerate(shape):
        others = [a for a in range(len(shape)) if a != axis]
        line = mask.any(dim=others) if others else mask
        touched = int(line.sum())
        count *= touched
        if touched == size:
            if size > 1:
                axes.append(axis)
        elif touched == 1:
            if not bool(line[at[axis]]):
                return None
        else:
            start = at[axis] // touched * touched
            if split is not None or size % touched or not bool(line[start : start + touched].all()):
                return None
            split = axis, touched
    if count != total:
        return None
    return Rows(shape, tuple(axes), *(split or (None, 0)))


def varying_axes(values: Tensor) -> tuple[int, ...] | None:
    """The axes along which a tensor is not constant."""
    scale = float(values.abs().amax())
    return tuple(
        a for a, size in enumerate(values.shape)
        if size > 1 and bool(((values - values.narrow(a, 0, 1)).abs() > 1e-8 * scale).any())
    )  # fmt: skip


def reduced(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The tensor with its constant axes cut to one."""
    for axis in range(values.dim()):
        if axis not in axes:
            values = values.narrow(axis, 0, 1)
    return values


def all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)
