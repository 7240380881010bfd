"""Row functions as `torch.library` operators, in the namespace `torch.ops.normfuse_rows`: one node in every graph.

An operator takes `x` with its rows along the last axis, and parameters that broadcast against it. Its gradient is an
operator too, and the gradient of that goes through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import LoweringError, NormfuseError
from normfuse.functional.matrices import Operand
from normfuse.lower.triton.launch import RowKernel, row_kernel, unavailable
from normfuse.lower.triton.region import Argument, per_column, rows, scalar

NAMESPACE = "normfuse_rows"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class RowOperator:
    """A function of rows: its reference over matrices, its tensors by name (`"weight?"`: may be None), its options."""

    name: str
    reference: Callable[..., Any]
    tensors: tuple[str, ...] = ("x",)
    options: tuple[str, ...] = ()
    results: tuple[str, ...] = ("y",)
    online: bool = True
    derived: Callable[..., Any] | None = None  # what gradients come from, where not from the reference
    inner: bool = False  # only its gradient is an operator
    numbers: tuple[str, ...] = ()  # which tensors are one number as a rule
    matrices: tuple[str, ...] = ("x", "w", "residual", "gate")  # and which are as large as x; the others are per column
    carried: str | None = None  # of x + residual, its second result: the inner operator that has its gradient

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.removesuffix("?") for name in self.tensors)

    # --- what it does

    def forward(self, *given: Any) -> Any:
        """The operator on real tensors."""
        tensors, options, kernel = self.split(given)
        operands, x = self.operands(tensors)
        if chosen(kernel, x, lambda: self.kernel(operands, options).supports(x.shape[-1])):
            found: Any = self.kernel(operands, options).forward(*(each.matrix for each in operands))
        else:
            matrices = {each.argument.name: each.full(x) for each in operands}
            found = self.reference(**matrices, **dict(options))
        shaped = [y.reshape(x.shape) for y in (found if isinstance(found, tuple) else [found])]
        return tuple(shaped) if len(shaped) > 1 else shaped[0]

    def backward(self, *given: Any) -> list[Tensor]:
        """The gradients that are wanted, of the tensors that are there."""
        count = len(self.results)
        grads, wanted, rest = given[:count], given[count], given[count + 1 :]
        tensors, options, kernel = self.split(rest)
        operands, x = self.operands(tensors)
        there = [i for i, tensor in enumerate(tensors) if tensor is not None]
        wants = tuple(bool(wanted[i]) for i in there)
        made = self.kernel(operands, options, self.derived)
        adjoints = [g.reshape(operands[0].matrix.shape) for g in grads]
        if chosen(kernel, x, lambda: made.supports(x.shape[-1])):
            found = made.gradients([*(each.matrix for each in operands), *adjoints], wants)
        else:
            found = made.backward(wants).run(*(each.full(x) for each in operands), *adjoints)
        asked = [each for each, wants_it in zip(operands, wants, strict=True) if wants_it]
        return [each.gradient(matrix, x) for each, matrix in zip(asked, found, strict=True)]

    def eager(self, *given: Any) -> Any:
        """The reference on tensors that autograd follows."""
        tensors, options, _ = self.split(given)
        known = {name: t for name, t in zip(self.names, tensors, strict=True) if t is not None}
        return (self.derived or self.reference)(**known, **dict(options))

    def kernel(
        self, operands: Sequence[Operand], options: tuple[tuple[str, Any], ...], other: Callable[..., Any] | None = None
    ) -> RowKernel:
        arguments = tuple(each.argument for each in operands)
        return row_kernel(self.name, other or self.reference, arguments, self.results, options, self.online)

    def usual(self, dtype: torch.dtype, options: dict[str, Any]) -> RowKernel:
        """The kernel for the usual extents of its tensors, all of one dtype: what is shown, compiled and measured."""

        def argument(name: str) -> Argument:
            make = scalar if name in self.numbers else rows if name in self.matrices else per_column
            return make(name, dtype)

        missing = [name for name in self.options if name not in options]
        if missing:
            raise NormfuseError(f"{self.name} needs {', '.join(missing)}")
        chosen = tuple((name, options[name]) for name in self.options)
        arguments = tuple(argument(name) for name in self.names)
        return row_kernel(self.name, self.reference, arguments, self.results, chosen, self.online)

    def operands(self, tensors: Sequence[Tensor | None]) -> tuple[list[Operand], Tensor]:
        x = tensors[0]
        assert x is not None
        named = zip(self.names, tensors, strict=True)
        return [Operand.of(name, tensor, x) for name, tensor in named if tensor is not None], x

    def split(self, given: Sequence[Any]) -> tuple[Sequence[Tensor | None], tuple[tuple[str, Any], ...], str]:
        count = len(self.tensors)
        return given[:count], tuple(zip(self.options, given[count:-1], strict=True)), given[-1]

    # --- how torch knows it

    def register(self, kinds: dict[str, str]) -> RowOperator:
        """Schema, fake and gradient. `kinds` are the types of the options."""
        typed = [f"Tensor{'?' * name.endswith('?')} {name.removesuffix('?')}" for name in self.tensors]
        parameters = ", ".join([*typed, *(f"{kinds[name]} {name}" for name in self.options), "str kernel"])
        results = ", ".join(f"Tensor d_{name}" for name in self.results)
        returns = "(" + ", ".join(["Tensor"] * len(self.results)) + ")"
        name = f"{NAMESPACE}::{self.name}"
        if not self.inner:
            _library.define(f"{self.name}({parameters}) -> {returns}")
            _library.impl(self.name, self.forward, "CompositeExplicitAutograd")
            torch.library.register_fake(name, self.fake, lib=_library)
            torch.library.register_autograd(name, self.differentiate, setup_context=self.remember, lib=_library)
        if not self.carried:
            _library.define(f"{self.name}_backward({results}, bool[] wanted, {parameters}) -> Tensor[]")
            _library.impl(f"{self.name}_backward", self.backward, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{name}_backward", self.fake_backward, lib=_library)
            torch.library.register_autograd(
                f"{name}_backward", self.differentiate_twice, setup_context=self.remember_backward, lib=_library
            )
        return self

    def fake(self, *given: Any) -> Any:
        found: list[Tensor] = [given[0].new_empty(given[0].shape) for _ in self.results]
        return tuple(found) if len(found) > 1 else found[0]

    def fake_backward(self, *given: Any) -> list[Tensor]:
        count = len(self.results)
        return [t.new_empty(t.shape) for t, wants in zip(given[count + 1 :], given[count], strict=False) if wants]

    def remember(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = inputs[: len(self.tensors)]
        ctx.save_for_backward(*((output[1], *tensors[2:]) if self.carried else tensors))
        ctx.rest = inputs[len(self.tensors) :]

    def differentiate(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needs = [bool(each) for each in ctx.needs_input_grad[: len(self.tensors)]]
        wanted = [needs[0] or needs[1], *needs[2:]] if self.carried else needs
        backward = getattr(getattr(torch.ops, NAMESPACE), f"{self.carried or self.name}_backward")
        found = iter(backward(*grads, wanted, *ctx.saved_tensors, *ctx.rest))
        given = [next(found) if wants else None for wants in wanted]
        return (*(given[:1] if self.carried else []), *given, *(None for _ in ctx.rest))

    def remember_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count = len(self.results)
        ctx.wanted, ctx.rest = inputs[count], inputs[count + 1 + len(self.tensors) :]
        ctx.save_for_backward(*inputs[:count], *inputs[count + 1 : count + 1 + len(self.tensors)])

    def differentiate_twice(self, ctx: Any, given: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The gradient of the gradient, through the reference."""
        count, again = len(self.results), torch.is_grad_enabled()
        with torch.enable_grad():
            saved = [
                t if t is None or (again and t.requires_grad) else t.detach().requires_grad_() for t in ctx.saved_tensors
            ]
            grads, tensors = saved[:count], saved[count:]
            y = self.eager(*tensors, *ctx.rest)
            asked: Any = [t for t, wants in zip(tensors, ctx.wanted, strict=True) if wants]
            first: Any = torch.autograd.grad(y, asked, grads, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(first, given, strict=True) if g is not None and v is not None]
            leaves = [t for t in saved if t is not None]
            second = torch.autograd.grad(
                [g for g, _ in pairs], leaves, [v for _, v in pairs], create_graph=again, allow_unused=True
            )
        found = iter(second)
        full = [None if t is None else next(found) for t in saved]
        return (*full[:count], None, *full[count:], *(None for _ in ctx.rest))


def chosen(kernel: str, x: Tensor, unsupported: Callable[[], str | None]) -> bool:
    """Whether the Triton kernel runs.

    Raises:
        NormfuseError: an unknown kernel, or `"triton"` where it cannot run.
    """
    if kernel not in ("auto", "triton", "reference"):
        raise NormfuseError(f"unknown kernel {kernel!r}: 'auto', 'triton' or 'reference'")
    if kernel == "reference" or (kernel == "auto" and x.device.type != "cuda"):
        return False
    reason = unavailable(x.device)
    try:
        reason = reason or unsupported()
    except LoweringError as error:
        reason = str(error)
    if reason and kernel == "triton":
        raise NormfuseError(reason)
    return reason is None
