"""What a captured model does besides computing its outputs: refused, or told apart from them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from normfuse.errors import CaptureError
from normfuse.graph.walk import behind


def refuse_side_effects(exported: ExportedProgram) -> None:
    """Raises `CaptureError` for state that an optimized model would have to keep.

    A parameter that is written once from parameters alone (RWKV rescales its layers when first called in inference mode)
    is no state: the graph computes with the new value, from the old one, whenever it is called.
    """
    for spec, item in zip(exported.graph_signature.output_specs, _outputs(exported), strict=True):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"the model writes to its buffer {spec.target!r} when called: an optimized model keeps no state; "
                "call model.eval(), or pass that state as an input"
            )
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise CaptureError(f"the model writes to its input {spec.target!r}: clone it in forward() first")
        if spec.kind is OutputKind.PARAMETER_MUTATION and _reads_inputs(exported, item):
            raise CaptureError(f"the model writes what depends on its inputs to its parameter {spec.target!r} when called")


def own_outputs(exported: ExportedProgram, items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of what the exported graph returns, what the model does: not the new values of parameters."""
    specs = exported.graph_signature.output_specs
    return tuple(item for spec, item in zip(specs, items, strict=True) if spec.kind is not OutputKind.PARAMETER_MUTATION)


def _outputs(exported: ExportedProgram) -> tuple[Any, ...]:
    return tuple(next(n for n in reversed(exported.graph.nodes) if n.op == "output").args[0])  # type: ignore[arg-type]


def _reads_inputs(exported: ExportedProgram, item: Any) -> bool:
    given = {
        s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT and hasattr(s.arg, "name")
    }
    return isinstance(item, fx.Node) and any(n.op == "placeholder" and n.name in given for n in behind(item))


@contextlib.contextmanager
def left_as_it_is(model: nn.Module) -> Generator[None]:
    """A call of the model leaves no trace: its buffers are copies meanwhile, and plain attributes are put back."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    for module in modules:
        module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
    try:
        yield
    finally:
        for module, before, own in zip(modules, attributes, buffers, strict=True):
            module._buffers.clear()
            module._buffers.update(own)
            for name in vars(module).keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
