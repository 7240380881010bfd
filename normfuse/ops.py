"""Operators that torch lacks, in the namespace `torch.ops.normfuse`.

Each has a schema, a reference made of aten operators (which also gives shapes, fake tensors and gradients) and says in
its docstring what it computes. Canonical graphs use them so that every later pass sees one spelling of each thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

if TYPE_CHECKING:
    from normfuse.rewrite import Editor, Value

_library = torch.library.Library("normfuse", "DEF")


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Sequence[int]) -> Tensor:
    """Gain and shift of shape `[x.shape[a] for a in axes]`, broadcast along the other axes."""
    if weight is not None:
        y = y * _along(weight, y.dim(), axes)
    return y if bias is None else y + _along(bias, y.dim(), axes)


def _along(p: Tensor, ndim: int, axes: Sequence[int]) -> Tensor:
    sizes = iter(p.shape)
    positions = {a % ndim for a in axes}
    return p.reshape([next(sizes) if i in positions else 1 for i in range(ndim)])


def _wide(x: Tensor) -> Tensor:
    """Statistics of half precision inputs are taken in float32, as every known implementation does."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_library.define("rms_norm(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor")


def rms_norm(
    x: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * x / sqrt(mean(x**2, axes) + eps) + bias, over ascending negative `axes`; same shape and dtype as `x`.

    Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(list(axes), keepdim=True) + eps)
    return _affine(_narrowed(y, x, weight), weight, bias, axes).to(x.dtype)


_library.define(
    "standardize(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps, str place='inside', "
    "bool centre=True, int ddof=0) -> Tensor"
)


def standardize(
    x: Tensor,
    axes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    place: str = "inside",
    centre: bool = True,
    ddof: int = 0,
) -> Tensor:
    """weight * d / root(sum(d**2, axes) / (n - ddof)) + bias, where d is x, less its mean if `centre`.

    The norms that torch's operators cannot say: `eps` stands `"inside"` the root, `"outside"` of it (added to it), or is
    its floor (`"clamp"`) or that of the mean square below it (`"floor"`); the variance may be unbiased (`ddof` 1).
    """
    wide, over = _wide(x), list(axes)
    d = wide - wide.mean(over, keepdim=True) if centre else wide
    mean_square = d.square().sum(over, keepdim=True) / (_count(x, over) - ddof)
    return _affine(_narrowed(d / _root(mean_square, eps, place), x, weight), weight, bias, axes).to(x.dtype)


_library.define("l2_norm(Tensor x, int[] axes, *, float eps, str place='clamp') -> Tensor")


def l2_norm(x: Tensor, axes: Sequence[int], *, eps: float, place: str = "clamp") -> Tensor:
    """x / root(sum(x**2, axes)); `eps` stands inside the root, outside of it, or is its floor (`"clamp"`, F.normalize).

    With `"floor"` it is the floor of the sum of squares.
    """
    wide = _wide(x)
    return (wide / _root(wide.square().sum(list(axes), keepdim=True), eps, place)).to(x.dtype)


_library.define("crms_norm(Tensor z, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor")


def crms_norm(
    z: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * z / sqrt((sum(z**2) + sum(z)**2) / (n + 1) + eps) + bias: an RMSNorm of n + 1 numbers of zero mean.

    The last of them, -sum(z), is not stored. Jiang et al. 2023 (arXiv 2305.14858), eq. 9.
    """
    wide, over = _wide(z), list(axes)
    total = wide.square().sum(over, keepdim=True) + wide.sum(over, keepdim=True).square()
    y = wide * torch.rsqrt(total / (_count(z, over) + 1) + eps)
    return _affine(_narrowed(y, z, weight), weight, bias, axes).to(z.dtype)


_library.define("softmax_over(Tensor x, int[] axes) -> Tensor")


def softmax_over(x: Tensor, axes: Sequence[int]) -> Tensor:
    """exp(x) over its sum along several axes at once."""
    wide, over = _wide(x), list(axes)
    e = torch.exp(wide - wide.amax(over, keepdim=True))
    return (e / e.sum(over, keepdim=True)).to(x.dtype)


_library.define("dyt(Tensor x, Tensor alpha, Tensor? weight=None, Tensor? bias=None) -> Tensor")


def dyt(x: Tensor, alpha: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """weight * tanh(alpha * x) + bias; the parameters broadcast with `x`. Zhu et al. 2025 (arXiv 2503.10622)."""
    y = _narrowed(torch.tanh(alpha * _wide(x)), x, weight)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


_library.define("derf(Tensor x, Tensor alpha, Tensor? shift=None, Tensor? weight=None, Tensor? bias=None) -> Tensor")


def derf(
    x: Tensor, alpha: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """weight * erf(alpha * x + shift) + bias; the parameters broadcast with `x`."""
    inner = alpha * _wide(x)
    y = _narrowed(torch.erf(inner if shift is None else inner + shift), x, weight)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _root(mean_square: Tensor, eps: float, place: str) -> Tensor:
    if place == "inside":
        return torch.sqrt(mean_square + eps)
    if place == "floor":
        return torch.sqrt(mean_square.clamp_min(eps))
    root = torch.sqrt(mean_square)
    return root + eps if place == "outside" else root.clamp_min(eps)


def _narrowed(y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """Rounded to the dtype of `x` before the gain, unless the gain is wider."""
    return y if weight is not None and weight.dtype != x.dtype else y.to(x.dtype)


def _count(x: Tensor, axes: Sequence[int]) -> Any:
    total: Any = 1
    for axis in axes:
        total = total * x.shape[axis]
    return total


for _reference in (rms_norm, standardize, l2_norm, crms_norm, softmax_over, dyt, derf):
    _library.impl(_reference.__name__, _reference, "CompositeImplicitAutograd")

RMS_NORM = torch.ops.normfuse.rms_norm
STANDARDIZE = torch.ops.normfuse.standardize
L2_NORM = torch.ops.normfuse.l2_norm
CRMS_NORM = torch.ops.normfuse.crms_norm
SOFTMAX_OVER = torch.ops.normfuse.softmax_over
DYT = torch.ops.normfuse.dyt
DERF = torch.ops.normfuse.derf


def decompose(node: fx.Node, edit: Editor) -> Value:
    """The reference of one of our operators, as aten nodes in the place of the call."""
    tensors = [n for n in node.all_input_nodes]
    fakes = [n.meta["val"] for n in tensors]

    def reference(*given: Any) -> Any:
        known = dict(zip(tensors, given, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with edit.program.fake_mode:
        traced = make_fx(reference, pre_dispatch=True)(*fakes)
    env: dict[fx.Node, Any] = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), tensors, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            args, kwargs = fx.map_arg((inner.args, dict(inner.kwargs)), env.__getitem__)
            env[inner] = edit.call(inner.target, *args, **kwargs).node
        elif inner.op == "output":
            return edit.value(env[inner.args[0]])
    raise AssertionError("a trace without output")
