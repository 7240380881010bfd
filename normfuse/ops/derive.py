"""From the record of a known function to a function for people, with its arguments checked, and to a page about it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor

from normfuse.errors import NormfuseError
from normfuse.ops.define import Operator, along_axes

KERNELS = ("auto", "reference")
_FACTS = {
    "row": "each row depends on itself alone", "centred": "rows have no mean", "multiple": "a row times one number",
    "odd": "f(-x) = -f(x)", "homogeneous": "f(c x) = f(x) for c > 0", "mean_blind": "f(x + c) = f(x)",
    "bounded": "bounded", "sums_to_one": "rows sum to one",
}  # fmt: skip


def is_callable(record: Operator) -> bool:
    """Has `normfuse.functional` a function of it?"""
    return record.ours or record.function is not None


def derive(record: Operator) -> Callable[..., Tensor]:
    """`f(x, ..., weight=None, bias=None, *, eps, axis=-1, kernel="auto")` with what of this the record has.

    Takes and returns floating-point tensors of one shape and dtype. Raises `NormfuseError` for what cannot be computed,
    `TypeError` for arguments that the signature does not have.
    """
    signature = signature_of(record)

    def function(*args: Any, **kwargs: Any) -> Tensor:
        given = _bound(record.stem, signature, args, kwargs)
        _check(record, given)
        del given["kernel"]
        if record.function is not None:
            named = [given.pop(name) for name, p in signature.parameters.items() if p.kind is not Parameter.KEYWORD_ONLY]
            return record.function(*named, **given)
        return _call(record, given)

    function.__name__ = function.__qualname__ = record.stem
    function.__doc__ = f"{description(record)}\n\nSource: {record.source}."
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def signature_of(record: Operator) -> inspect.Signature:
    if record.function is not None:
        own = list(inspect.signature(record.function).parameters.values())
    else:
        own = _own_parameters(record)
    kernel = Parameter("kernel", Parameter.KEYWORD_ONLY, default="auto")
    plain = [p.replace(annotation=Parameter.empty) for p in own]
    return inspect.Signature([*plain, kernel])


def _own_parameters(record: Operator) -> list[Parameter]:
    """Tensors in the order of the schema, then numbers by name."""
    rest = [a for a in record.packet.default._schema.arguments[1:] if a.name != "axes"]
    tensors = [a for a in rest if "Tensor" in str(a.type)]
    numbers = [a for a in rest if "Tensor" not in str(a.type)]
    axis = [Parameter("axis", Parameter.KEYWORD_ONLY, default=-1)] if record.row or record.gain else []
    return [
        Parameter("x", Parameter.POSITIONAL_OR_KEYWORD),
        *(Parameter(a.name, Parameter.POSITIONAL_OR_KEYWORD, default=_default(a)) for a in tensors),
        *(Parameter(a.name, Parameter.KEYWORD_ONLY, default=_default(a)) for a in numbers),
        *axis,
    ]


def _default(argument: Any) -> Any:
    return argument.default_value if argument.has_default_value() else Parameter.empty


def _bound(stem: str, signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{stem}{signature}: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _check(record: Operator, given: Mapping[str, Any]) -> None:
    x, stem = given["x"], record.stem
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        raise NormfuseError(f"{stem}: x must be a floating-point tensor with at least one axis")
    if given["kernel"] not in KERNELS:
        raise NormfuseError(f"{stem}: there is no kernel {given['kernel']!r} of it: choose one of {', '.join(KERNELS)}")
    eps = given.get("eps", 0.0)
    if not isinstance(eps, int | float) or not math.isfinite(eps) or eps < 0:
        raise NormfuseError(f"{stem}: eps must be a number that is not negative, not {eps!r}")
    axes = axes_of(stem, given.get("axis", 1 if record.function else -1), x.dim())
    wanted = tuple(x.shape[a] for a in axes)
    for name in (record.gain, record.shift):
        factor = given.get(name) if name else None
        if factor is not None and (not isinstance(factor, Tensor) or tuple(factor.shape) != wanted):
            had = tuple(factor.shape) if isinstance(factor, Tensor) else factor
            raise NormfuseError(f"{stem}: {name} must have the shape {wanted} of x along its axes {axes}, not {had}")


def axes_of(stem: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """One axis or several, ascending and negative. Raises `NormfuseError` for those that there are not."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) < len(axes):
        raise NormfuseError(f"{stem}: axis {axis!r} of a tensor with {ndim} axes: choose from {-ndim} to {ndim - 1}")
    return tuple(sorted(a % ndim - ndim for a in axes))


def _call(record: Operator, given: dict[str, Any]) -> Tensor:
    x = given.pop("x")
    axes = axes_of(record.stem, given.pop("axis", -1), x.dim())
    if record.axes is along_axes:
        return record.packet(x, axes, **given)  # type: ignore[no-any-return]
    sizes = [x.shape[a] if a in axes else 1 for a in range(-x.dim(), 0)]
    for name in (record.gain, record.shift):
        if name is not None and given[name] is not None:
            given[name] = given[name].reshape(sizes)
    return record.packet(x, **given)  # type: ignore[no-any-return]


def description(record: Operator) -> str:
    """What it computes, in the words of its reference."""
    told = inspect.getdoc(record.reference or record.function)
    return told or f"{record.stem}, as torch has it."


def page(record: Operator) -> str:
    """The page of a known function, in Markdown."""
    facts = [text for name, text in _FACTS.items() if getattr(record, name)]
    called = f"normfuse.functional.{record.stem}{signature_of(record)}" if is_callable(record) else str(record.packet)
    kinds = ", ".join([record.kind] if isinstance(record.kind, str) else record.kinds)
    return (
        f"# {record.stem}\n\n```python\n{called}\n```\n\n{description(record)}\n\n"
        f"- Source: {record.source}\n- Facts: {'; '.join(facts) or 'none'}\n- In the inventory: {kinds or 'not counted'}\n"
    )


__all__ = ["derive", "is_callable", "page", "signature_of"]
