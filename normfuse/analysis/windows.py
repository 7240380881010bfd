"""How a convolution moves along its spatial axes, and the one frame into which several convolutions fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from normfuse.graph.node import arguments, same_size


@dataclass(frozen=True)
class Window:
    """The taps of one spatial axis: how many, how far apart, the output's step, zeros below and above the input."""

    size: int = 1
    stride: int = 1
    dilation: int = 1
    low: int = 0
    high: int = 0

    @property
    def extent(self) -> int:
        return (self.size - 1) * self.dilation + 1

    @property
    def pointwise(self) -> bool:
        return self.size == 1 and self.stride == 1

    @property
    def padded(self) -> bool:
        return self.low != 0 or self.high != 0

    @property
    def surplus(self) -> int:
        """(input size + surplus) // stride + 1 is the output size."""
        return self.low + self.high - self.extent

    def padded_by(self, other: Window) -> Window:
        return replace(self, low=self.low + other.low, high=self.high + other.high)


Windows = tuple[Window, ...]


@dataclass(frozen=True)
class Placement:
    """How a kernel is put into a common window: taps spread by `dilation`, then so many zeros before and behind."""

    dilation: int
    before: int
    behind: int


def common(windows: Sequence[Window], given: Any, wanted: Any) -> Window | str:
    """The window in which all of these fit (input size `given`, output size `wanted`), or why there is none."""
    strides = {w.stride for w in windows}
    if len(strides) != 1:
        return "the branches have different strides"
    stride, low = strides.pop(), max(w.low for w in windows)
    dilations = {w.dilation for w in windows if w.size > 1}
    dilation = dilations.pop() if len(dilations) == 1 else 1
    if any((low - w.low) % dilation for w in windows):
        dilation = 1
    extent = max(w.extent + low - w.low for w in windows)
    surplus = max(w.surplus for w in windows)
    static = isinstance(given, int) and isinstance(wanted, int)
    if any(w.surplus != surplus for w in windows) and not (static or (same_size(given, wanted) and stride == 1)):
        return "the branches agree in size for some input sizes only"
    high = surplus + extent - low
    if high != low and static and (given + 2 * low - extent) // stride + 1 == wanted and given + 2 * low >= extent:
        high = low
    return Window((extent - 1) // dilation + 1, stride, dilation, low, high)


def placement(window: Window, frame: Window) -> Placement:
    """Where the taps of `window` lie in `frame`."""
    spread = window.dilation // frame.dilation if window.size > 1 else 1
    before = (frame.low - window.low) // frame.dilation
    return Placement(spread, before, frame.size - before - ((window.size - 1) * spread + 1))


def count(sizes: Sequence[Any]) -> int | None:
    """The product of sizes, free ones at the value that the example had; None where that is not known."""
    total = 1
    for size in sizes:
        hint = size if isinstance(size, int) else getattr(size.node, "hint", None)
        if hint is None:
            return None
        total *= int(hint)
    return total


def per_axis(item: Any, n: int) -> list[int]:
    """A size for each of n axes, however it was given."""
    items = [item] if isinstance(item, int) else list(item)
    return items * n if len(items) == 1 else items


def windows_of(node: fx.Node, kernel: Sequence[Any]) -> Windows | None:
    """How the convolution `node` with a kernel of these sizes moves, if all of that is numbers."""
    n, a = len(kernel), arguments(node)
    strides, dilations, padding = per_axis(a["stride"], n), per_axis(a["dilation"], n), a["padding"]
    if isinstance(padding, str):
        around = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
        pads = [(p // 2, p - p // 2) for p in around]
    else:
        pads = [(p, p) for p in per_axis(padding, n)]
    if not all(isinstance(x, int) for x in (*kernel, *strides, *dilations, *(p for pair in pads for p in pair))):
        return None
    taps = zip(kernel, strides, dilations, pads, strict=True)
    return tuple(Window(k, s, d, low, high) for k, s, d, (low, high) in taps)


__all__ = ["Placement", "Window", "Windows", "common", "count", "per_axis", "placement", "windows_of"]
