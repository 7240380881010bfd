"""The record of a known function, and what the references of our operators share: gains along axes, roots, rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Given = Mapping[str, Any]
"""The arguments of a call by schema name, defaults filled in."""
Sizes = Sequence[Any]
Role = Literal["norm", "softmax", "squash", "attention", "activation"]


def along_axes(given: Given, sizes: Sizes) -> Sequence[int]:
    """The argument `axes` of our operators."""
    return given["axes"]  # type: ignore[no-any-return]


def no_axes(given: Given, sizes: Sizes) -> Sequence[int]:
    """A function of one element, or of several tensors."""
    return ()


@dataclass(frozen=True, eq=False)
class Operator:
    """A known function: the one record from which all that depends on the operator is derived.

    With a `schema` (all but the name) it is ours: `torch.ops.normfuse.<stem>` is registered, its `reference` in aten
    gives shapes, fake tensors, gradients and the decomposition. Without one it is torch's own, `torch.ops.aten.<stem>`.
    """

    stem: str
    schema: str = ""
    reference: Callable[..., Tensor] | None = None
    _: KW_ONLY
    role: Role
    source: str
    kind: str | Callable[[Given], str | None] | None = None
    """In the inventory, perhaps by the arguments of a call; None: it is not counted."""
    kinds: tuple[str, ...] = ()
    """Those that a function for `kind` may say."""
    canonical: bool = True
    """False: another operator says the same, and stands in canonical graphs."""
    also: tuple[str, ...] = ()
    """Other operators of torch with the same arguments."""

    # which argument is what
    axes: Callable[[Given, Sizes], Sequence[int]] = along_axes
    gain: str | None = "weight"
    shift: str | None = "bias"
    eps: str | None = "eps"
    place: str | None = None
    """Where eps stands: inside the root where no argument says it."""
    fixed: tuple[str, ...] = ()
    """Arguments that must be weights for the call to count: stored statistics."""

    # facts of the function without its gain and shift; eps aside
    row: bool = True
    """A row over `axes` depends on the same row of the input, whatever its axes are called."""
    centred: bool = False
    """A row of the result has no mean."""
    multiple: bool = False
    """A row of the result is the row of the input times one number."""
    odd: bool = False
    """f(-x) = -f(x)."""
    homogeneous: bool = False
    """f(c x) = f(x) for every c > 0."""
    mean_blind: bool = False
    """f(x + c) = f(x) for every number c."""
    bounded: bool = False
    """No result is larger than a number that its size gives."""
    sums_to_one: bool = False
    """A row of the result sums to one."""

    # costs and lowering
    each: int | Callable[[Given], int] = 0
    """Operations on each element, without gain and shift."""
    factors: tuple[str, ...] = ("weight", "bias")
    """Arguments that cost an operation on each element where they are given."""
    by_reference: bool = True
    """The probe tries the reference itself; False: the family has a closed form of it."""
    function: Callable[..., Tensor] | None = None
    """In `normfuse.functional`, where its signature is not the usual one."""

    def __post_init__(self) -> None:
        if self.schema:
            assert self.reference is not None, f"{self.stem} has a schema and no reference"
            library = torch.library.Library("normfuse", "FRAGMENT")  # what it registers goes with it
            library.define(self.stem + self.schema)
            library.impl(self.stem, self.reference, "CompositeImplicitAutograd")
            object.__setattr__(self, "_library", library)

    @property
    def ours(self) -> bool:
        return bool(self.schema)

    @cached_property
    def packet(self) -> Any:
        """What `is_op` takes."""
        return getattr(torch.ops.normfuse if self.ours else torch.ops.aten, self.stem)

    @cached_property
    def packets(self) -> tuple[Any, ...]:
        return (self.packet, *(getattr(torch.ops.aten, name) for name in self.also))

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names in the order of the schema; the first is the input."""
        overload = getattr(self.packet, self.packet.overloads()[0])
        return tuple(a.name for a in overload._schema.arguments)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        overload = getattr(self.packet, self.packet.overloads()[0])
        return {a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()}

    @cached_property
    def alone(self) -> bool:
        """A row function of ours that needs no argument but its input, axes and eps."""
        needed = [name for name in self.arguments[1:] if name not in self.defaults and name != self.eps]
        return self.ours and self.row and self.axes is along_axes and needed == ["axes"]

    def kind_of(self, given: Given) -> str | None:
        return self.kind(given) if callable(self.kind) else self.kind

    def each_of(self, given: Given) -> int:
        return self.each(given) if callable(self.each) else self.each

    def axes_of(self, given: Given, sizes: Sizes) -> tuple[int, ...]:
        """Negative."""
        return tuple(int(a) % len(sizes) - len(sizes) for a in self.axes(given, sizes))

    def eps_of(self, given: Given) -> float | None:
        return given[self.eps] if self.eps else None


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Sequence[int]) -> Tensor:
    """Gain and shift of shape `[x.shape[a] for a in axes]`, broadcast along the other axes."""
    if weight is not None:
        y = y * _along(weight, y.dim(), axes)
    return y if bias is None else y + _along(bias, y.dim(), axes)


def _along(p: Tensor, ndim: int, axes: Sequence[int]) -> Tensor:
    positions = {a % ndim for a in axes}
    if not positions or min(positions) + len(positions) == ndim:
        return p  # along the last axes it broadcasts as it is
    sizes = iter(p.shape)
    return p.reshape([next(sizes) if i in positions else 1 for i in range(ndim)])


def widened(x: Tensor) -> Tensor:
    """Statistics of half precision inputs are taken in float32, as every known implementation does."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def root_of(mean_square: Tensor, eps: float, place: str) -> Tensor:
    if place == "inside":
        return torch.sqrt(mean_square + eps)
    if place == "floor":
        return torch.sqrt(mean_square.clamp_min(eps))
    root = torch.sqrt(mean_square)
    return root + eps if place == "outside" else root.clamp_min(eps)


def narrowed(y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """Rounded to the dtype of `x` before the gain, unless the gain is wider."""
    return y if weight is not None and weight.dtype != x.dtype else y.to(x.dtype)


def count_of(x: Tensor, axes: Sequence[int]) -> Any:
    total: Any = 1
    for axis in axes:
        total = total * x.shape[axis]
    return total
