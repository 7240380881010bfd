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
    y = (wide * torch.rsqrt(wide.square().mean(list(axes), keepdim=True) + eps)).to(x.dtype)
    return _affine(y, weight, bias, axes)


_library.impl("rms_norm", rms_norm, "CompositeImplicitAutograd")

RMS_NORM = torch.ops.normfuse.rms_norm


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
