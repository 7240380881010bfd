"""Caches of transformers as inputs and outputs: taken apart into tensors and put together again with all that they know.

Whoever has registered such a class before is left alone; what that loses is refused by name (`normfuse.graph.carried`).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils import _pytree as pytree

_CLASSES = ("DynamicCache", "StaticCache", "EncoderDecoderCache")
_LENGTH = "cumulative_length"
_REMADE = "_sliding_window_tensor"
_OWN = "transformers."
_stand_ins: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
_ATOMS = (bool, int, float, str, type(None))


def support_transformers_caches() -> None:
    """Register the caches with pytree, where transformers is loaded and nobody has done so."""
    home = sys.modules.get("transformers.cache_utils")
    for name in _CLASSES:
        kind = getattr(home, name, None)
        if kind is None or kind in pytree.SUPPORTED_NODES:
            continue
        with contextlib.suppress(ValueError):  # registered meanwhile
            pytree.register_pytree_node(
                kind, _flatten, _unflatten,
                serialized_type_name=f"{kind.__module__}.{kind.__name__}", flatten_with_keys_fn=_flatten_with_keys,
            )  # fmt: skip
            register_pytree_flatten_spec(kind, lambda cache, spec: _flatten(cache)[0])


def _flatten(cache: Any) -> tuple[list[Tensor], Any]:
    leaves: dict[str, Tensor] = {}
    context = _taken_apart(cache, "", leaves)
    return list(leaves.values()), context


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[Any, Tensor]], Any]:
    leaves: dict[str, Tensor] = {}
    context = _taken_apart(cache, "", leaves)
    return [(pytree.MappingKey(name), leaf) for name, leaf in leaves.items()], context


def _unflatten(leaves: Any, context: Any) -> Any:
    return _put_together(context, iter(leaves))


def _taken_apart(given: Any, name: str, leaves: dict[str, Tensor]) -> Any:
    """What `given` is besides its tensors, in words that JSON knows."""
    if isinstance(given, Tensor):
        leaves[name] = given
        return ["tensor"]
    if isinstance(given, _ATOMS):
        return ["value", given]
    if isinstance(given, torch.dtype | torch.device):
        return ["dtype" if isinstance(given, torch.dtype) else "device", str(given).removeprefix("torch.")]
    if isinstance(given, type):
        return ["class", f"{given.__module__}:{given.__qualname__}"]
    below = f"{name}_" if name else ""
    if isinstance(given, list | tuple):
        parts = [_taken_apart(each, f"{below}{i}", leaves) for i, each in enumerate(given)]
        return ["list" if isinstance(given, list) else "tuple", parts]
    if isinstance(given, dict):
        return ["dict", [[key, _taken_apart(each, f"{below}{key}", leaves)] for key, each in given.items()]]
    if not type(given).__module__.startswith(_OWN) or not hasattr(given, "__dict__"):
        raise TypeError(f"a cache with a {type(given).__name__} in it")
    return ["object", f"{type(given).__module__}:{type(given).__qualname__}", _attributes(given, below, leaves)]


def _attributes(given: Any, below: str, leaves: dict[str, Tensor]) -> list[Any]:
    parts: list[Any] = []
    for key, each in vars(given).items():
        if key == _REMADE:
            parts.append([key, ["window", int(given.sliding_window), str(each.device)]])
        elif key == _LENGTH and not isinstance(each, Tensor) and isinstance(keys := getattr(given, "keys", None), Tensor):
            leaves[f"{below}{key}"] = _stand_in(given, keys, each)
            parts.append([key, ["length"]])
        else:
            parts.append([key, _taken_apart(each, f"{below}{key}", leaves)])
    return parts


def _stand_in(layer: Any, keys: Tensor, length: Any) -> Tensor:
    """A tensor without numbers, but with a size that can be free: the length goes on from step to step.

    The same one for the same length: who says which sizes are free finds a tensor by its identity.
    """
    if isinstance(keys, FakeTensor) or not isinstance(length, int):
        return keys.new_empty((keys.shape[0], 0, length))
    known, shape = _stand_ins.get(layer), (keys.shape[0], 0, length)
    if known is None or known.shape != shape or known.dtype != keys.dtype or known.device != keys.device:
        known = _stand_ins[layer] = keys.new_empty(shape)
    return known


def _put_together(context: Any, leaves: Any) -> Any:
    kind, *rest = context
    if kind in ("tensor", "length"):
        leaf = next(leaves)
        return leaf if kind == "tensor" else _length(leaf)
    if kind in ("dtype", "device", "window"):
        return _value(kind, *rest)
    if kind == "class":
        return _class(rest[0])
    if kind in ("list", "tuple"):
        parts = [_put_together(each, leaves) for each in rest[0]]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        return {key: _put_together(each, leaves) for key, each in rest[0]}
    if kind == "object":
        own = _class(rest[0])
        made = own.__new__(own)
        made.__dict__.update({key: _put_together(each, leaves) for key, each in rest[1]})
        return made
    return rest[0]


def _length(leaf: Any) -> Any:
    """Of the stand-in, its last size; pytree also puts together trees of things that are no tensors."""
    return leaf.shape[2] if isinstance(leaf, Tensor) else leaf


def _value(kind: str, *rest: Any) -> Any:
    if kind == "window":
        return torch.tensor(rest[0], dtype=torch.long, device=rest[1])
    return getattr(torch, rest[0]) if kind == "dtype" else torch.device(rest[0])


def _class(name: str) -> Any:
    home, _, path = name.partition(":")
    if not home.startswith(_OWN):
        raise TypeError(f"{name} is no class of transformers")
    found: Any = importlib.import_module(home)
    for part in path.split("."):
        found = getattr(found, part)
    return found
