"""What a captured model does besides computing its outputs: refused, or told apart from them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from normfuse.errors import CaptureError


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
    seen: set[fx.Node] = set()
    pending = [item] if isinstance(item, fx.Node) else []
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and node.name in given:
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def refuse_changed_objects(model: nn.Module, before: list[Any], inputs: Any, result: Any) -> None:
    """Raises `CaptureError` where the call has put other tensors into its inputs (lists, dicts, caches) and does not return
    them: an optimized model leaves its inputs as they are."""
    known = {id(each) for each in (*before, *pytree.tree_leaves(result))}
    args, kwargs = inputs
    for name, given in (*enumerate(args), *kwargs.items()):
        leaves = (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))
        if any(leaf.numel() and id(leaf) not in known for leaf in leaves):
            raise CaptureError(
                f"{type(model).__name__} puts another tensor into its input {name!r} when called and does not return it: "
                "an optimized model leaves its inputs as they are -- return it from forward()"
            )


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
