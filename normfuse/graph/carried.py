"""What inputs lose when they are taken apart into tensors and put together again: objects may know more than they tell."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, equal, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

_PLAIN = (tuple, list, dict, OrderedDict, defaultdict, deque, type(None))
ADVICE = "pass its tensors one by one, or register its class with pytree so that nothing is lost"


def has_objects(spec: pytree.TreeSpec) -> bool:
    """Are there others among the inputs than tensors, constants, and Python's own containers of them?"""
    own = spec.type not in _PLAIN and not spec.is_leaf() and not pytree.is_namedtuple_class(spec.type)
    return own or any(has_objects(child) for child in spec.children())


def copied(tree: Any) -> Any:
    """The same objects once more, with tensors of their own: `deepcopy` refuses what a model computed."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return copy.deepcopy(tree, {id(leaf): leaf.detach().clone() for leaf in leaves})


def lost(given: Any, name: str = "") -> str:
    """The first thing that `given` loses, and how it comes back; nothing: ""."""
    if isinstance(given, Mapping) and type(given) in _PLAIN:
        return next((why for key, each in given.items() if (why := lost(each, f"{name}.{key}" if name else f"{key}"))), "")
    if type(given) in _PLAIN or pytree.is_namedtuple_instance(given):
        return next((why for i, each in enumerate(given or ()) if (why := lost(each, f"{name}[{i}]"))), "")
    if type(given) not in pytree.SUPPORTED_NODES:
        return ""
    try:
        leaves, spec = pytree.tree_flatten(given)
        back = pytree.tree_unflatten(leaves, spec)
    except Exception as error:
        return f"{name} cannot be taken apart ({error!s:.100})"
    seen = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    return _difference(given, back, name, seen)


def _difference(given: Any, back: Any, name: str, seen: set[int]) -> str:
    """Tensors that are leaves (their ids are among `seen`) are carried; so is what was looked at already."""
    if given is back or id(given) in seen:
        return ""
    if type(given) is not type(back):
        return f"{name} is {_told(given)} and comes back as {_told(back)}"
    if isinstance(given, Tensor):
        return "" if _same(given, back) else f"the tensor {name} does not come back"
    seen.add(id(given))
    pairs = _parts(given, back, name)
    if pairs is None:
        same = isinstance(given, nn.Module) or _equal(given, back)
        return "" if same else f"{name} is {_told(given)} and comes back as {_told(back)}"
    if len(pairs[0]) != len(pairs[1]) or pairs[0].keys() != pairs[1].keys():
        odd = sorted(pairs[0].keys() ^ pairs[1].keys(), key=str)
        return f"{odd[0]} does not come back as it was"
    return next((why for k, each in pairs[0].items() if (why := _difference(each, pairs[1][k], str(k), seen))), "")


def _parts(given: Any, back: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What two objects of one class are made of, by path; None where they are values."""
    if isinstance(given, nn.Module | type) or callable(given):
        return None
    mine, theirs = ({**_items(each, name), **_attributes(each, name)} for each in (given, back))
    return (mine, theirs) if mine or theirs else None


def _items(each: Any, name: str) -> dict[str, Any]:
    if isinstance(each, Mapping):
        return {f"{name}[{key!r}]": part for key, part in each.items()}
    return {f"{name}[{i}]": part for i, part in enumerate(each)} if isinstance(each, tuple | list | deque) else {}


def _attributes(each: Any, name: str) -> dict[str, Any]:
    slots = [slot for kind in type(each).__mro__ for slot in _slots(kind) if hasattr(each, slot)]
    found = {slot: getattr(each, slot) for slot in slots} | getattr(each, "__dict__", {})
    return {f"{name}.{key}": part for key, part in found.items()}


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


def _same(given: Tensor, back: Tensor) -> bool:
    if given.shape != back.shape or given.dtype != back.dtype:
        return False
    traced = isinstance(given, FakeTensor) or isinstance(back, FakeTensor) or given.is_meta or back.is_meta
    return traced or equal(given, back.to(given.device))


def _equal(given: Any, back: Any) -> bool:
    if isinstance(given, float) and given != given:
        return back != back
    with contextlib.suppress(Exception):
        same = given == back
        return bool(same.all()) if hasattr(same, "all") else bool(same)
    return False


def _told(each: Any) -> str:
    return f"{each!r:.40}" if isinstance(each, int | float | str | bool | type(None)) else f"a {type(each).__name__}"
