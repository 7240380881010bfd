"""Names of inputs, outputs and free sizes as the model's caller knows them."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from normfuse.graph.program import Program

CONDITIONS = "normfuse.conditions"
"""Where a file's metadata lists what must hold of its sizes."""


def name_values(model: Any, form: Program) -> None:
    """Inputs and outputs as the model's caller knows them; free sizes as batch, sequence, height, width."""
    sizes = axis_names(form)
    _number(model)
    from torch.onnx import ONNXProgram

    ONNXProgram(model, None).rename_axes({k: v for k, v in sizes.items() if k != v})  # type: ignore[arg-type]
    taken = {value.name for value in model.graph.inputs}
    for value, name in zip(model.graph.outputs, output_names(form), strict=True):
        if name not in taken:
            taken.add(name)
            value.name = name


def _number(model: Any) -> None:
    """A size that the exporter was told as a symbol, and that turned out to be a number, is that number."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        sizes: list[Any] = list(value.shape or ())
        told: list[Any] = [
            int(str(s.value)) if isinstance(s, ir.SymbolicDim) and str(s.value).isdigit() else s for s in sizes
        ]
        if told != sizes:
            value.shape = ir.Shape(told)


def output_names(program: Program) -> list[str]:
    """One name per tensor of the output: the key in the model's own output structure, or its place."""
    spec = program.signature.out_spec
    items = list(program.output.args[0])  # type: ignore[arg-type]
    try:
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(items, spec))[0]
        names = [_key_name(path) for path, _ in paths]
    except Exception:  # a class whose registration tells no keys
        names = [""] * len(items)
    return [
        name or f"output_{place}"
        for place, (name, item) in enumerate(zip(names, items, strict=True))
        if isinstance(item, fx.Node)
    ]


def _key_name(path: tuple[Any, ...]) -> str:
    parts = [str(next(v for v in (getattr(k, a, None) for a in ("key", "name", "idx")) if v is not None)) for k in path]
    return (
        "_".join(parts)
        if any(not part.isdigit() for part in parts)
        else ("output_" + "_".join(parts) if parts else "output")
    )


def axis_names(program: Program) -> dict[str, str]:
    """A readable name for each free size of the inputs."""
    names: dict[str, str] = {}
    for leaf in program.signature.leaves:
        for axis, size in enumerate(leaf.sizes):
            if isinstance(size, str) and size not in names:
                name = _axis_name(axis, len(leaf.sizes))
                names[size] = name if name not in names.values() else f"{leaf.name}_{name}"
    return names


def _axis_name(axis: int, rank: int) -> str:
    if axis == 0:
        return "batch"
    if rank <= 3 and axis == 1:
        return "sequence"
    return {2: "height", 3: "width"}.get(axis, f"axis{axis}") if rank == 4 else f"axis{axis}"
