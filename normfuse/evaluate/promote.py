"""float64 in the place of every narrower floating dtype."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.graph.node import invoke

_PROMOTED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def promote(leaf: Any) -> Any:
    """float64 in place of any other floating dtype, for tensors and for dtypes themselves."""
    if isinstance(leaf, Tensor):
        return leaf.to(_PROMOTED[leaf.dtype]) if leaf.dtype in _PROMOTED else leaf
    return _PROMOTED.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


@contextlib.contextmanager
def default_float64() -> Generator[None]:
    """Factories and integer divisions follow the default dtype: float64 for as long as a promoted run lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """One operator with its dtype arguments promoted."""
    return invoke(node, pytree.tree_map(promote, args), pytree.tree_map(promote, kwargs))


def give_back() -> None:
    """Return freed memory to the system where the C library would keep it (glibc); elsewhere do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
