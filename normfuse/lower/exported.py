"""Lowering to an ExportedProgram: for `.pt2` archives and for torch's ONNX exporter."""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from normfuse.graph.node import value
from normfuse.graph.program import Program

_KINDS = {"parameter": InputKind.PARAMETER, "buffer": InputKind.BUFFER, "constant": InputKind.CONSTANT_TENSOR}
_PREFIX = {"parameter": "p_", "buffer": "b_", "constant": "c_"}


def to_exported(program: Program) -> ExportedProgram:
    """The program as torch's own interchange form. Its graph must be lowered to operators that the reader knows."""
    graph, inputs = _with_lifted_tensors(program)
    outputs = [_output_spec(item) for item in _output(graph).args[0]]  # type: ignore[union-attr]
    signature = program.signature
    entry = ModuleCallEntry(
        "", ModuleCallSignature(inputs=[], outputs=[], in_spec=signature.in_spec, out_spec=signature.out_spec)
    )
    kept = {
        n: t for n, t in program.tensors.items() if program.origins[n].kind != "constant" and program.origins[n].persistent
    }
    state = {
        n: torch.nn.Parameter(t, requires_grad=False)
        if program.origins[n].kind == "parameter" and t.is_floating_point()
        else t
        for n, t in kept.items()
    }
    module = fx.GraphModule(torch.nn.Module(), graph)
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=_ranges(program),
        module_call_graph=[entry],
        example_inputs=None,
        constants={n: t for n, t in program.tensors.items() if n not in state},
    )


def _with_lifted_tensors(program: Program) -> tuple[fx.Graph, list[InputSpec]]:
    """Parameters become inputs, in front of the user's."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    specs: list[InputSpec] = []
    weights = [n for n in program.graph.nodes if n.op == "get_attr"]
    for node in weights:
        name = str(node.target)
        origin = program.origins[name]
        lifted = graph.placeholder(_PREFIX[origin.kind] + name.replace(".", "_"))
        lifted.meta = {"val": value(node), "tensor_meta": None}
        env[node] = lifted
        persistent = origin.persistent if origin.kind == "buffer" else None
        specs.append(InputSpec(_KINDS[origin.kind], TensorArgument(lifted.name), name, persistent))
    for node, leaf in zip(program.placeholders, program.signature.leaves, strict=True):
        given = graph.placeholder(node.name)
        given.meta = dict(node.meta)
        env[node] = given
        argument = TensorArgument(given.name) if leaf.is_tensor else ConstantArgument(given.name, leaf.constant)
        specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    for node in program.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    return graph, specs


def _output(graph: fx.Graph) -> fx.Node:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def _output_spec(item: object) -> OutputSpec:
    if not isinstance(item, fx.Node):
        return OutputSpec(OutputKind.USER_OUTPUT, ConstantArgument("", item), None)  # type: ignore[arg-type]
    argument = TensorArgument(item.name) if isinstance(value(item), torch.Tensor) else SymIntArgument(item.name)
    return OutputSpec(OutputKind.USER_OUTPUT, argument, None)


def _ranges(program: Program) -> dict[sympy.Symbol, ValueRanges]:  # type: ignore[type-arg]
    known: dict[sympy.Symbol, ValueRanges] = {}  # type: ignore[type-arg]
    for node in program.placeholders:
        val = value(node)
        for size in val.shape if isinstance(val, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    low, high = program.signature.ranges.get(str(symbol), (0, 2**62))
                    known[symbol] = ValueRanges(low, int_oo if high >= 2**62 else high)
    return known
