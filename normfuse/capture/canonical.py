"""From an ExportedProgram to the canonical graph: wrappers inlined, mutation removed, parameters as `get_attr` nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from normfuse.capture.branches import conditions_of
from normfuse.capture.effects import own_outputs, refuse_side_effects
from normfuse.capture.writes import functional_twin, mutated_by, name_of, needs_functionalization
from normfuse.errors import CaptureError
from normfuse.graph import spelling
from normfuse.graph.node import (
    arguments,
    aten,
    dtype,
    expression,
    is_getitem,
    is_op,
    place_in,
    source_line,
    value,
)
from normfuse.graph.program import Kind, Origin, Program
from normfuse.graph.roles import constants
from normfuse.graph.signature import Leaf, Signature
from normfuse.graph.structure import check_structure
from normfuse.ops.rms_norm import RMS_NORM

_KINDS: dict[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


def from_exported(exported: ExportedProgram) -> Program:
    """The canonical program of an ExportedProgram. Raises `CaptureError` for what inference cannot keep."""
    if needs_functionalization(exported.graph_module):
        exported = exported.run_decompositions({})
    refuse_side_effects(exported)
    program = _Builder(exported).build()
    _simplify(program)
    program.drop_dead()
    _weights_first(program)
    program.graph.lint()
    check_structure(program, after="capture")
    return program


def _weights_first(program: Program) -> None:
    """What depends on parameters alone stands before what depends on inputs: a weight can then feed any operator."""
    place = next((n for n in reversed(program.graph.nodes) if n.op == "placeholder"), None)
    for node in sorted(constants(program)):
        if place is not None and place.next is not node:
            place.append(node)
        place = node
        node.meta["constant"] = True


# -- building -----------------------------------------------------------------------------------------------------


class _Builder:
    """One walk over the exported graph, which is left as it was."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.origins: dict[str, Origin] = {}
        self.by_identity: dict[tuple[Any, ...], str] = {}
        self.leaves: list[Leaf] = []
        self.written: dict[fx.Node, fx.Node] = {}

    def build(self) -> Program:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
        inputs = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        self._collect_tensors([specs[n.name] for n in inputs if n.name in specs])
        for node in sorted(inputs, key=lambda n: specs[n.name].kind is not InputKind.USER_INPUT):
            self._input(node, specs[node.name])  # the user's inputs first: weight programs may stand behind any weight
        self._body(self.exported.graph_module)
        return Program(
            self.graph, self.tensors, self.origins, self._signature(), _fake_mode(self.exported.graph_module.graph)
        )

    def _collect_tensors(self, specs: list[InputSpec]) -> None:
        """Every name of every tensor; tied tensors share one entry under the name that the model lists first."""
        names: dict[str, tuple[Tensor, Kind, bool]] = {}
        for spec in specs:
            kind = _KINDS.get(spec.kind)
            if kind is None or spec.target is None:
                continue
            names[spec.target] = (self._tensor(spec.target), kind, spec.persistent is not False)
        aliases: dict[tuple[Any, ...], list[str]] = {}
        for name, (tensor, _, _) in names.items():
            aliases.setdefault(_identity(tensor), []).append(name)
        order = {name: i for i, name in enumerate(self.exported.state_dict)}
        for key, group in aliases.items():
            first = min(group, key=lambda n: order.get(n, len(order)))
            tensor, kind, persistent = names[first]
            self.by_identity[key] = first
            self.tensors[first] = tensor.detach()
            self.origins[first] = Origin(tuple(sorted(group, key=lambda n: order.get(n, len(order)))), kind, persistent)

    def _tensor(self, name: str) -> Tensor:
        found: Any = self.exported.state_dict.get(name, self.exported.constants.get(name))
        assert isinstance(found, Tensor)
        return found

    def _input(self, node: fx.Node, spec: InputSpec) -> None:
        if spec.kind is InputKind.USER_INPUT:
            new = self.graph.placeholder(node.name)
            new.meta = dict(node.meta)
            self.env[node] = new
            self.leaves.append(_leaf(node, spec))
            return
        if spec.kind not in _KINDS or spec.target is None:
            raise CaptureError(f"the model needs an input of kind {spec.kind.name}, which normfuse cannot keep")
        name = self.by_identity[_identity(self._tensor(spec.target))]
        new = next((n for n in self.graph.nodes if n.op == "get_attr" and n.target == name), None)
        if new is None:
            new = self.graph.create_node("get_attr", name, (), {}, name=name.replace(".", "_"))
            new.meta = {"val": value(node), "site_name": name}
        self.env[node] = new

    def _body(self, module: torch.nn.Module) -> Any:
        assert isinstance(module, fx.GraphModule)
        for node in module.graph.nodes:
            if node.op in ("placeholder",):
                continue
            if node.op == "get_attr":
                self.env[node] = self._attribute(module, node)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], self._resolve)
                if module is self.exported.graph_module:
                    self.graph.output(own_outputs(self.exported, tuple(result)))
                return result
            elif name_of(node) in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
                self.env[node] = self._inline(module, node)
            elif is_getitem(node) and isinstance(self.env.get(node.args[0]), list | tuple):  # type: ignore[arg-type]
                self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            else:
                self._call(node)
        return None

    def _resolve(self, node: fx.Node) -> Any:
        new = self.env[node]
        while isinstance(new, fx.Node) and new in self.written:
            new = self.written[new]
        return new

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        found = module.get_submodule(str(node.target)) if hasattr(module, str(node.target).split(".")[0]) else None
        return found

    def _inline(self, module: fx.GraphModule, node: fx.Node) -> Any:
        """`with torch.no_grad():` and disabled autocast leave nothing behind at inference."""
        first = 1 if name_of(node) == "wrap_with_set_grad_enabled" else 4
        body = self.env[node.args[first]]  # type: ignore[index]
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        for inner, outer in zip(inputs, node.args[first + 1 :], strict=True):
            self.env[inner] = self._resolve(outer) if isinstance(outer, fx.Node) else outer
        return self._body(body)

    def _call(self, node: fx.Node) -> None:
        target = node.target
        mutated = mutated_by(node)
        if mutated:
            target = functional_twin(node)
            if target is None:
                raise CaptureError(f"the operator {node.target} at {source_line(node)} writes in place and has no twin")
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._resolve)
        new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)  # type: ignore[arg-type]
        new.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "nn_module_stack", "source_fn_stack")}
        self.env[node] = new
        if mutated:
            self.written[self._resolve(mutated[0])] = new

    def _signature(self) -> Signature:
        spec = self.exported.call_spec
        ranges: dict[str, tuple[int, int]] = {}
        for symbol, bounds in self.exported.range_constraints.items():
            low, high = _as_int(bounds.lower, 0), _as_int(bounds.upper, 2**62)
            # Torch assumes "at least 2" of every free size. A batch of one is tried by verification; other sizes keep it.
            is_batch = any(leaf.sizes and leaf.sizes[0] == str(symbol) for leaf in self.leaves)
            ranges[str(symbol)] = (1 if is_batch and low == 2 else low, high)
        assert spec.in_spec is not None
        assert spec.out_spec is not None
        free = {str(size) for leaf in self.leaves for size in leaf.sizes if isinstance(size, str)}
        conditions = conditions_of(self._shape_env(), {name: ranges.get(name, (0, 2**62)) for name in free})
        return Signature(tuple(self.leaves), spec.in_spec, spec.out_spec, None, ranges, conditions)

    def _shape_env(self) -> Any:
        modes = (getattr(n.meta.get("val"), "fake_mode", None) for n in self.exported.graph.nodes)
        return next((mode.shape_env for mode in modes if mode is not None), None)


def _as_int(bound: Any, otherwise: int) -> int:
    try:
        return int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return otherwise


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Tied tensors are one tensor: same storage, same place in it, same layout."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _leaf(node: fx.Node, spec: InputSpec) -> Leaf:
    val = value(node)
    if not isinstance(val, Tensor):
        constant = getattr(spec.arg, "value", val)
        if isinstance(val, torch.SymInt | torch.SymFloat):
            raise CaptureError(f"input {node.name!r} is a free number: pass it as a tensor, or keep it fixed")
        return Leaf(node.name, constant=constant)
    sizes = tuple(s if isinstance(s := expression(size), int) else _size(s) for size in val.shape)
    return Leaf(node.name, val.dtype, sizes)


def _size(expression: Any) -> int | str:
    """A free size by its symbol; one that the exporter has found to be fixed, by its number."""
    return int(expression) if expression.is_Integer else str(expression)


def _fake_mode(graph: fx.Graph) -> Any:
    from torch._guards import detect_fake_mode

    values = [v for n in graph.nodes if isinstance(v := n.meta.get("val"), Tensor)]
    return detect_fake_mode(values) or torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


# -- what carries no meaning --------------------------------------------------------------------------------------

_ASSERTIONS = (
    aten._assert_tensor_metadata,
    aten._assert_scalar,
    aten._assert_async,
    aten.sym_constrain_range,
    aten.sym_constrain_range_for_size,
)
_BATCH_NORMS = (
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional, aten.cudnn_batch_norm,
    aten._batch_norm_impl_index, aten.miopen_batch_norm, aten._native_batch_norm_legit_no_training,
)  # fmt: skip
_COPIES = (aten.alias, aten.detach, aten.detach_, aten.lift_fresh_copy, aten.lift_fresh, aten.lift)


def _simplify(program: Program) -> None:
    for node in list(program.graph.nodes):
        if is_op(node, *_ASSERTIONS):
            program.graph.erase_node(node)
        elif is_op(node, *_COPIES) or _is_same_dtype(node):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        elif is_op(node, *_BATCH_NORMS) and not (a := arguments(node)).get("training") and a.get("running_mean") is not None:
            _retarget(node, lambda a: (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], False,
                                       0.0, a.get("eps", a.get("epsilon")), False), aten.batch_norm.default)
        elif is_op(node, aten.native_group_norm):
            _retarget(node, lambda a: (a["input"], a["group"], a["weight"], a["bias"], a["eps"], False),
                      aten.group_norm.default)
        elif is_op(node, aten.native_layer_norm):
            _retarget(node, lambda a: (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"], False),
                      aten.layer_norm.default)
        elif is_op(node, aten.rms_norm):
            _to_our_rms_norm(node)
    _spell(program)


def _to_our_rms_norm(node: fx.Node) -> None:
    """`eps=None` means the machine epsilon of the dtype it runs in: of the dtype it was captured in, from now on."""
    given = arguments(node)
    eps = given["eps"]
    if eps is None:
        own = dtype(node) or torch.float32
        eps = torch.finfo(torch.float32 if own in (torch.float16, torch.bfloat16) else own).eps
    axes = list(range(-len(given["normalized_shape"]), 0))
    node.target = RMS_NORM.default
    node.args, node.kwargs = (given["input"], axes, given["weight"], None), {"eps": float(eps)}


def _spell(program: Program) -> None:
    """Every call in its one spelling; what a tensor lies like in memory may change with what computes it."""
    for node in [n for n in program.graph.nodes if n.op == "call_function" and not spelling.is_canonical(n)]:

        def make(target: Any, *args: Any, before: fx.Node = node) -> fx.Node:
            with program.graph.inserting_before(before):
                new = program.graph.call_function(target, args)
            with program.fake_mode, torch.no_grad():
                new.meta = {**before.meta, "val": target(*fx.map_arg(args, value))}
            return new

        node.target, node.args, node.kwargs = spelling.spelt(node.target, node.args, node.kwargs, make)


def _is_same_dtype(node: fx.Node) -> bool:
    """A cast to the dtype that the value has already, on the same device, is the value itself."""
    if not is_op(node, aten.to, aten._to_copy, aten.type_as) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value(node.args[0]), value(node)
    return isinstance(before, Tensor) and dtype(node) == before.dtype and after.device == before.device


def _retarget(node: fx.Node, args: Callable[[dict[str, Any]], tuple[Any, ...]], target: Any) -> None:
    """An operator with several results of which inference reads the first: its one-result spelling."""
    for user in [u for u in node.users if is_getitem(u) and not u.users]:
        node.graph.erase_node(user)
    users = [u for u in node.users if is_getitem(u)]
    if any(place_in(u) != 0 for u in users):
        return
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args(arguments(node)))
    new.meta = {**node.meta, "val": value(node)[0]}
    for user in users:
        if place_in(user) == 0:
            user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
