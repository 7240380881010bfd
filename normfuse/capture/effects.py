"""What a captured model does besides computing its outputs: refused, or told apart from them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from normfuse.errors import CaptureError
from normfuse.graph.carried import lost
from normfuse.graph.node import aten, is_op, site, source_line
from normfuse.graph.program import Program
from normfuse.graph.roles import is_random
from normfuse.graph.walk import behind

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def refuse_side_effects(exported: ExportedProgram) -> None:
    """Raises `CaptureError` for state that an optimized model would have to keep.

    A parameter that is written once from parameters alone (RWKV rescales its layers when first called in inference mode)
    is no state: the graph computes with the new value, from the old one, whenever it is called.
    """
    for spec, item in zip(exported.graph_signature.output_specs, _outputs(exported), strict=True):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise CaptureError(written_to(str(spec.target)))
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise CaptureError(f"the model writes to its input {spec.target!r}: clone it in forward() first")
        if spec.kind is OutputKind.PARAMETER_MUTATION and _reads_inputs(exported, item):
            raise CaptureError(f"the model writes what depends on its inputs to its parameter {spec.target!r} when called")


def written_to(buffer: str) -> str:
    return (
        f"the model writes to its buffer {buffer!r} when called: an optimized model keeps no state; call model.eval(), or "
        "pass that state as an input"
    )


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


def tensors_of(inputs: Inputs) -> list[list[Tensor]]:
    """The tensors of each input."""
    return [_tensors(given) for _, given in named_inputs(inputs)]


def named_inputs(inputs: Inputs) -> list[tuple[int | str, Any]]:
    return [*enumerate(inputs[0]), *inputs[1].items()]


def _tensors(given: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]


def refuse_changed_objects(model: nn.Module, before: list[list[Tensor]], inputs: Inputs, result: Any) -> None:
    """Raises `CaptureError` where the call has changed what its inputs (lists, dicts, caches) hold and does not return it.

    An optimized model leaves its inputs as they are.
    """
    returned = {id(each) for each in pytree.tree_leaves(result)}
    for (name, given), leaves in zip(named_inputs(inputs), before, strict=True):
        after = _tensors(given)
        same = [id(leaf) for leaf in after] == [id(leaf) for leaf in leaves]
        if lost(given) or (not same and any(leaf.numel() and id(leaf) not in returned for leaf in after)):
            raise CaptureError(
                f"{type(model).__name__} changes its input {name!r} when called and does not return it: "
                "an optimized model leaves its inputs as they are -- return it from forward()"
            )


def random_sites(program: Program) -> list[str]:
    """Where the program draws random numbers (a recurrent layer may, and does not at inference)."""
    drawing = (n for n in program.graph.nodes if is_random(n) and not is_op(n, *_RECURRENT))
    return list(dict.fromkeys(f"{node.target} in {source_line(node) or site(node)}" for node in drawing))


@contextlib.contextmanager
def left_as_it_is(model: nn.Module) -> Generator[list[str]]:
    """A call of the model leaves no trace: its buffers are copies meanwhile, and plain attributes are put back.

    The buffers that were written to, by name, stand in the list afterwards: held by an attribute, they are no copies.
    """
    written: list[str] = []
    with buffers_put_back(model, written), attributes_put_back(model):
        modules = list(model.modules())
        buffers = [dict(module._buffers) for module in modules]
        for module in modules:
            module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
        copies = {name: (b, _version(b)) for name, b in model.named_buffers(remove_duplicate=False)}
        try:
            yield written
        finally:
            written += [name for name, (b, version) in copies.items() if _version(b) != version]
            for module, before in zip(modules, buffers, strict=True):
                module._buffers.clear()
                module._buffers.update(before)


@contextlib.contextmanager
def buffers_put_back(model: nn.Module, written: list[str] | None = None) -> Generator[None]:
    """The buffers have the same values after as before; the names of those that were written to go to `written`."""
    own = {name: (b, b.clone(), _version(b)) for name, b in model.named_buffers()}
    try:
        yield
    finally:
        for name, (buffer, value, version) in own.items():
            if _version(buffer) != version:
                if written is not None:
                    written.append(name)
                with torch.no_grad():
                    buffer.copy_(value)


@contextlib.contextmanager
def attributes_put_back(model: Any) -> Generator[None]:
    """What calls leave in plain attributes of the modules, and in lists and dicts there, goes again.

    Unless a call has written to a parameter: an attribute that says so must then stay.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    attributes = [dict(vars(module)) for module in modules]
    held = [each for own in attributes for name, each in own.items() if name not in _TORCHS and type(each) in (list, dict)]
    contents = [each.copy() for each in held]
    versions = _versions(modules)
    try:
        yield
    finally:
        if _versions(modules) == versions:
            for module, before in zip(modules, attributes, strict=True):
                for name in vars(module).keys() - before.keys():
                    del module.__dict__[name]
                module.__dict__.update(before)
            for each, content in zip(held, contents, strict=True):
                _put_back(each, content)


def _put_back(held: Any, content: Any) -> None:
    held.clear()
    held.extend(content) if isinstance(held, list) else held.update(content)


def _versions(modules: list[nn.Module]) -> list[int]:
    own = (p for module in modules for p in module._parameters.values() if p is not None)
    return [_version(p) for p in own]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_TORCHS = frozenset(vars(nn.Module()))
_RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
