"""float64 in the place of every narrower floating dtype."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.evaluate.float64 import in_float64

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


def give_back() -> None:
    """Return freed memory to the system where the C library would keep it (glibc); elsewhere do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
