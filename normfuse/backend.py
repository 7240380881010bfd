"""`torch.compile(model, backend="normfuse")`: registered by entry point, so that normfuse need not be imported.

Dynamo's graph goes the same way as any model: canonical form, passes, bake, verification. Below stands inductor, or plain
torch with `options={"below": "torch"}`. It is for inference: under gradients the graph goes to what stands below
unchanged, since baked weights have no gradient to give.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add, itemgetter
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, compile_context, tracing
from torch._subclasses import FakeTensor

from normfuse.errors import InputError, NormfuseError, PassError
from normfuse.weights.watch import Watch

Compiled = Callable[..., Any]
_FEW_RUNS = 8
_OPTIONS = ("below", "passes", "disable", "verify", "mode")


def normfuse_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one Dynamo graph.

    `options`: `below` ("inductor" or "torch"), `passes`, `disable` and `verify` as in `optimize`, and `mode`, since
    `torch.compile` takes either a mode or options. `mode`: a mode of inductor. A graph that cannot be captured goes to what
    stands below unchanged, with a warning that says why. At every call the weights are asked whether they have changed (see
    `Watch` for what that sees); then everything is baked anew. Raises `PassError` for unknown options and modes.
    """
    given = dict(options or {})
    if unknown := [name for name in given if name not in _OPTIONS]:
        raise PassError(f"unknown option {unknown[0]!r}: the options are {', '.join(_OPTIONS)}")
    below = _below(str(given.pop("below", "inductor")), given.pop("mode", None) or mode)
    inputs = list(example_inputs)
    weights = [i for i, x in enumerate(inputs) if _is_weight(x)]
    held = [*module.parameters(), *module.buffers()]
    if any(isinstance(x, FakeTensor) for x in inputs) or not (weights or held):
        return below(module, inputs)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in [*inputs, *held]):
        _warn("gradients are on: the model is compiled as it is; call it under torch.no_grad() to have it optimized")
        return below(module, inputs)
    return _Specialised(module, inputs, weights, below, given)


def _warn(text: str) -> None:
    warnings.warn(f"normfuse: {text}", stacklevel=3)


def _below(name: str, mode: str | None) -> Callable[[fx.GraphModule, list[Any]], Compiled]:
    if name not in ("inductor", "torch"):
        raise PassError(f'unknown option below={name!r}: choose "inductor" or "torch"')
    if name == "torch":
        if mode not in (None, "default"):
            raise PassError(f'mode={mode!r} is one of inductor\'s: leave out options={{"below": "torch"}}')
        return lambda module, _: module.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    if (mode := mode or "default") not in (modes := list_mode_options()):
        raise PassError(f"unknown mode {mode!r}: the modes are {', '.join(modes)}")

    def inductor(module: fx.GraphModule, inputs: list[Any]) -> Compiled:
        if TracingContext.try_get() is not None:  # Dynamo compiles, and knows which sizes are free
            return compile_fx(module, inputs, config_patches=modes[mode])  # type: ignore[return-value]
        return torch.compile(module, options=modes[mode])

    return inductor


def _is_weight(item: Any) -> bool:
    """Dynamo passes parameters and buffers of modules as inputs whose address it has marked as static."""
    from torch._dynamo.utils import get_static_address_type

    return isinstance(item, nn.Parameter) or (isinstance(item, Tensor) and get_static_address_type(item) is not None)


class _Closed(nn.Module):
    """The Dynamo graph as a model of its tensor inputs alone: weights are closed over, and numbers of Python, which a
    dynamic graph takes as inputs (an eps); free sizes are read off the tensors."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], weights: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.weights = set(weights)
        self.total = len(inputs)
        self.sizes = _where_sizes_come_from(module, inputs)
        self.numbers = {i: inputs[i].item() for i in _numbers(module, inputs)}
        self.closed_over = {*self.weights, *self.sizes, *self.numbers}
        for i in weights:
            if isinstance(inputs[i], nn.Parameter):
                self.register_parameter(f"weight_{i}", inputs[i])
            else:
                self.register_buffer(f"weight_{i}", inputs[i])

    def tensors(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Of all of Dynamo's inputs those that this model takes."""
        return tuple(x for i, x in enumerate(inputs) if i not in self.closed_over)

    def forward(self, *given: Any) -> Any:
        rest = iter(given)
        values: list[Any] = [None] * self.total
        for i in range(self.total):
            if i in self.weights:
                values[i] = getattr(self, f"weight_{i}")
            elif i in self.numbers:
                values[i] = numpy.float64(self.numbers[i])  # the graph calls `.item()` on it, and on nothing else
            elif i not in self.sizes:
                values[i] = next(rest)
        for i, (tensor, axis) in self.sizes.items():
            values[i] = values[tensor].shape[axis]
        return self.module(*values)


def _numbers(module: fx.GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Which inputs are numbers of Python: tensors that the graph does nothing with but ask for their item."""

    def asked_for_item(node: fx.Node) -> bool:
        return bool(node.users) and all(u.op == "call_method" and u.target == "item" for u in node.users)

    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    wrapped = [isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.float64 for x in inputs]
    return [i for i, node in enumerate(nodes) if wrapped[i] and not _is_weight(inputs[i]) and asked_for_item(node)]


def _where_sizes_come_from(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """For each input that is a free size: which tensor input has it, along which axis."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    found: dict[int, tuple[int, int]] = {}
    for i, given in enumerate(inputs):
        if not isinstance(given, torch.SymInt):
            continue
        for j, node in enumerate(nodes):
            known = node.meta.get("example_value")
            for axis, size in enumerate(known.shape if isinstance(known, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == given.node.expr:
                    found.setdefault(i, (j, axis))
        if i not in found:
            raise NormfuseError("a free size of the graph belongs to none of its inputs")
    return found


class _Specialised:
    """A compiled graph for the weights as they are now; when one of them changes, everything is baked anew."""

    def __init__(
        self, module: fx.GraphModule, inputs: list[Any], weights: list[int], below: Any, options: dict[str, Any]
    ) -> None:
        self.module, self.weights, self.below, self.options = module, weights, below, options
        self.held = (*module.parameters(), *module.buffers())
        self.pick = _picker(weights)
        self.pick_numbers = _picker(_numbers(module, inputs))
        self.numbers = self._numbers(tuple(inputs))
        self._take(inputs)

    def _numbers(self, inputs: tuple[Any, ...]) -> list[Any]:
        return [x.item() for x in self.pick_numbers(inputs)]

    def _take(self, inputs: Sequence[Any]) -> None:
        try:
            watch = Watch(self.pick(tuple(inputs)) + self.held)  # before: what changes meanwhile is noticed
            self.run: Compiled = self._compile(list(inputs))
        except PassError:
            raise
        except NormfuseError as error:
            self._leave(inputs, str(error))
        else:
            self.watch: Watch | None = watch

    def _leave(self, inputs: Sequence[Any], reason: str) -> None:
        """Weights and numbers are inputs of what stands below: there is nothing to watch."""
        _warn(f"left to what stands below: {reason}")
        self.run, self.watch = self.below(self.module, list(inputs)), None

    def _compile(self, inputs: list[Any]) -> Compiled:
        from normfuse.api import optimize_flat

        closed = _Closed(self.module, inputs, self.weights).eval()
        tensors = closed.tensors(inputs)
        # Dynamo is in the middle of a compilation: what our own capture learns is no guard of that one.
        with tracing(None), compile_context(None):
            shapes = "auto" if closed.sizes else None
            optimized, signature = optimize_flat(closed, tensors, dynamic_shapes=shapes, **self.options)
        compiled = self.below(optimized, list(tensors))

        def run(*given: Any) -> Any:
            leaves = closed.tensors(given)
            if closed.sizes:
                signature.check(list(leaves))
            return compiled(*leaves)

        return run

    def __call__(self, *given: Any) -> Any:
        if self.watch is None:
            return self.run(*given)
        if self._numbers(given) != self.numbers:
            self._leave(given, "a number that is an input changes from call to call; make it a tensor to have it optimized")
        elif not self.watch.same(self.pick(given) + self.held):
            self._take(given)
        try:
            return self.run(*given)
        except InputError as error:  # a size that is free here, and was not to be freed by capture
            self._leave(given, str(error))
            return self.run(*given)


def _picker(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What takes the things at these ascending positions out of a tuple, as fast as Python can."""
    starts = [i for i in positions if i - 1 not in positions]
    ends = [i + 1 for i in positions if i + 1 not in positions]
    runs = [slice(*run) for run in zip(starts, ends, strict=True)]
    if len(runs) > _FEW_RUNS:
        return itemgetter(*positions)
    return lambda given: reduce(add, map(given.__getitem__, runs), ())


__all__ = ["normfuse_backend"]
