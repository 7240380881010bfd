"""How a program is called: names, nesting, sizes and conditions of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normfuse.errors import InputError
from normfuse.graph.carried import ADVICE, has_objects, lost
from normfuse.graph.conditions import Condition, unmet


@dataclass(frozen=True)
class Leaf:
    """What one flattened input must be: a tensor with these sizes (symbols may vary), or exactly this constant."""

    name: str
    dtype: torch.dtype | None = None
    sizes: tuple[int | str, ...] = ()
    constant: Any = None

    @property
    def is_tensor(self) -> bool:
        return self.dtype is not None


@dataclass(frozen=True)
class Signature:
    """How the program is called: names and nesting of the inputs, nesting of the outputs, ranges of the free sizes, and
    what else must hold of them."""

    leaves: tuple[Leaf, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameters: inspect.Signature | None = None
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Why each size that may not vary is as it is: `x.shape[1]` -> a reason."""

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Leaves of a call in graph order, after checking them.

        Raises `InputError` when structure, rank, dtype or a fixed size differs from what was captured, and for sizes
        with which the model would take another branch.
        """
        if (direct := self._direct(args, kwargs)) is not None:
            self.check(direct)
            return direct
        bound_args, bound_kwargs = bind(self.parameters, args, kwargs)
        wanted = cast("tuple[str, ...]", tuple(self.in_spec.child(1).context or ()))
        extra = {k: v for k, v in bound_kwargs.items() if k not in wanted}
        if surplus := [k for k, v in extra.items() if v is not None and not self._is_default(k, v)]:
            raise InputError(
                f"this program was captured without the input {surplus[0]!r}: pass it in the example inputs of optimize()"
            )
        if missing := [k for k in wanted if k not in bound_kwargs]:
            raise InputError(f"input {missing[0]!r} is missing: the program was captured with {list(wanted)}")
        leaves, spec = pytree.tree_flatten((bound_args, {k: bound_kwargs[k] for k in wanted}))
        if spec != self.in_spec:
            mine, theirs = (" ".join(str(each).split()) for each in (self.in_spec, spec))
            raise InputError(f"inputs are nested as {theirs:.300}, but the program was captured with {mine:.300}")
        if self._has_objects and (why := lost(bound_args) or lost(dict(bound_kwargs))):
            raise InputError(f"inputs lose state when they are taken apart: {why}: {ADVICE}")
        self.check(leaves)
        return leaves

    @cached_property
    def _has_objects(self) -> bool:
        return has_objects(self.in_spec)

    @cached_property
    def _flat_names(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Names of the call's parameters and of the inputs, where every input is one tensor that has a name."""
        plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
        if self.parameters is None or any(p.kind is not plain for p in self.parameters.parameters.values()):
            return None
        named = self.in_spec.child(1)
        if self.in_spec.child(0).num_leaves or named.num_leaves != named.num_children:
            return None
        return tuple(self.parameters.parameters), tuple(named.context or ())

    def _direct(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The leaves of a call that names or places each tensor and nothing else: the common case, without a search."""
        names = self._flat_names
        if names is None or len(args) > len(names[0]) or len(args) + len(kwargs) != len(names[1]):
            return None
        given: dict[str, Any] = {**dict(zip(names[0], args, strict=False)), **kwargs}
        if len(given) != len(names[1]):
            return None
        leaves = [given.get(name) for name in names[1]]
        return leaves if all(isinstance(leaf, Tensor) for leaf in leaves) else None

    def _is_default(self, name: str, given: Any) -> bool:
        parameter = self.parameters.parameters.get(name) if self.parameters else None
        return parameter is not None and parameter.default is given

    def check(self, leaves: list[Any]) -> None:
        sizes: dict[str, int] = {}
        for leaf, given in zip(self.leaves, leaves, strict=True):
            if not leaf.is_tensor:
                if given is not leaf.constant and given != leaf.constant:
                    raise InputError(f"input {leaf.name!r} was captured as {leaf.constant!r} and cannot be {given!r}")
                continue
            if not isinstance(given, Tensor):
                raise InputError(f"input {leaf.name!r} must be a tensor, not {type(given).__name__}")
            if given.dtype != leaf.dtype:
                raise InputError(f"input {leaf.name!r} must be {leaf.dtype}, not {given.dtype}")
            if given.dim() != len(leaf.sizes):
                raise InputError(f"input {leaf.name!r} must have shape {list(leaf.sizes)}, not {list(given.shape)}")
            for position, (want, size) in enumerate(zip(leaf.sizes, given.shape, strict=True)):
                self._check_size(leaf, position, want, size, sizes)
        for problem in unmet(self.conditions, sizes, self.size_names):
            raise InputError(f"{problem}: pass an example of such sizes, or dynamic_shapes=None")

    def size_names(self) -> dict[str, str]:
        """Each free size as the caller knows it: `x.shape[1]`."""
        names: dict[str, str] = {}
        for leaf in self.leaves:
            for axis, size in enumerate(leaf.sizes):
                if isinstance(size, str):
                    names.setdefault(size, f"{leaf.name}.shape[{axis}]")
        return names

    def numbers(self) -> dict[str, int]:
        """The fixed sizes of the inputs: `x.shape[1]` -> 64."""
        return {
            f"{leaf.name}.shape[{axis}]": size
            for leaf in self.leaves for axis, size in enumerate(leaf.sizes) if isinstance(size, int)
        }  # fmt: skip

    def _check_size(self, leaf: Leaf, position: int, want: int | str, size: int, seen: dict[str, int]) -> None:
        where = f"input {leaf.name!r}, dimension {position}"
        if isinstance(want, int):
            if size != want:
                why = self.fixed.get(f"{leaf.name}.shape[{position}]", "it was captured so")
                raise InputError(f"{where} is fixed at {want} and cannot be {size}: {why}")
            return
        if seen.setdefault(want, size) != size:
            raise InputError(f"{where} must be {seen[want]} like the other inputs' {want}, not {size}")
        low, high = self.ranges.get(want, (0, 2**62))
        if not (low <= size <= high):
            raise InputError(f"{where} must lie in [{low}, {high}], not {size}")


def bind(
    parameters: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One spelling of a call: everything that has a name goes by name. Raises `InputError` as Python would TypeError."""
    if parameters is None:
        return args, dict(kwargs)
    try:
        bound = parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the model cannot be called with these inputs: {error}") from None
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    for name, given in bound.arguments.items():
        kind = parameters.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            # What stands before *args can only be passed by position once *args is used.
            positional = (*named.values(), *given) if given else positional
            named = {} if given else named
        elif kind is inspect.Parameter.POSITIONAL_ONLY:
            positional = (*positional, given)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(given)
        else:
            named[name] = given
    return positional, named
