"""float64 in the place of every narrower floating dtype."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.graph.node import aten

PROMOTED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def promote(leaf: Any) -> Any:
    """float64 in place of any other floating dtype, for tensors and for dtypes themselves."""
    if isinstance(leaf, Tensor):
        return leaf.to(PROMOTED[leaf.dtype]) if leaf.dtype in PROMOTED else leaf
    return PROMOTED.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """One operator with its dtype arguments promoted."""
    return in_float64(node.target, pytree.tree_map(promote, args), pytree.tree_map(promote, kwargs))


def in_float64(target: Any, args: Any, kwargs: Any) -> Any:
    """One operator on promoted values, its floating results in float64.

    Factories and arithmetic of integers follow torch's default dtype, which belongs to the whole process: it is left
    alone, for other threads serve models meanwhile, and what came out in it is computed again.
    """
    result = target(*args, **kwargs)
    if isinstance(result, Tensor):
        return _widened(target, args, kwargs, result) if result.dtype in PROMOTED else result
    if any(isinstance(leaf, Tensor) and leaf.dtype in PROMOTED for leaf in pytree.tree_leaves(result)):
        return _widened(target, args, kwargs, result)
    return result


def _widened(target: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """The same with the dtype said, or with its integers and plain numbers in float64."""
    schema = getattr(target, "_schema", None)
    if isinstance(result, Tensor) and schema is not None and any(a.name == "dtype" for a in schema.arguments):
        return target(*args, **{**kwargs, "dtype": promote(result.dtype)})
    if getattr(target, "overloadpacket", None) is aten.where:
        return torch.where(args[0], *(torch.as_tensor(a, dtype=torch.float64, device=args[0].device) for a in args[1:]))
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.double(), (args, kwargs))
    return pytree.tree_map(promote, target(*args, **kwargs))


def give_back() -> None:
    """Return freed memory to the system where the C library would keep it (glibc); elsewhere do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
