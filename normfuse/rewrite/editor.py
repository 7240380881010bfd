"""The only hand that changes a graph: makes nodes with shapes and provenance, replaces, removes, and keeps the books."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph.node import arguments, aten, invoke, is_weight, op_name, parameters_of, rank, shape, value
from normfuse.graph.program import Origin, Program
from normfuse.graph.spelling import spelt
from normfuse.rewrite.record import FiringKey, Log


class Value:
    """A node as an expression: arithmetic and the operators of `Editor.op` make further nodes."""

    __slots__ = ("editor", "node")

    def __init__(self, node: fx.Node, editor: Editor) -> None:
        self.node = node
        self.editor = editor

    def __add__(self, other: Any) -> Value:
        return self.editor.call(aten.add.Tensor, self, other)

    def __radd__(self, other: Any) -> Value:
        return self.editor.call(aten.add.Tensor, self, other)

    def __sub__(self, other: Any) -> Value:
        return self.editor.call(aten.sub.Tensor, self, other)

    def __mul__(self, other: Any) -> Value:
        return self.editor.call(aten.mul.Tensor, self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.editor.call(aten.mul.Tensor, self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.editor.call(aten.div.Tensor, self, other)

    def __neg__(self) -> Value:
        return self.editor.call(aten.neg.default, self)

    def __matmul__(self, other: Any) -> Value:
        return self.editor.call(aten.matmul.default, self, other)

    def __getitem__(self, index: int) -> Value:
        return self.editor.call(operator.getitem, self, index)

    def mean(self, axes: int | Sequence[int], keepdim: bool = True) -> Value:
        return self.editor.call(aten.mean.dim, self, [axes] if isinstance(axes, int) else list(axes), keepdim)

    def sum(self, axes: int | Sequence[int], keepdim: bool = False) -> Value:
        return self.editor.call(aten.sum.dim_IntList, self, [axes] if isinstance(axes, int) else list(axes), keepdim)

    def rsqrt(self) -> Value:
        return self.editor.call(aten.rsqrt.default, self)

    def reshape(self, *sizes: Any) -> Value:
        return self.editor.call(aten.reshape.default, self, list(sizes))

    def unsqueeze(self, axis: int) -> Value:
        return self.editor.call(aten.unsqueeze.default, self, axis)

    def transpose(self, a: int, b: int) -> Value:
        return self.editor.call(aten.transpose.int, self, a, b)

    def to(self, dtype: torch.dtype) -> Value:
        return self if value(self.node).dtype == dtype else self.editor.call(aten.to.dtype, self, dtype)

    def along(self, axis: int, ndim: int) -> Value:
        """A vector reshaped to broadcast along `axis` of a tensor of `ndim` dimensions."""
        axis %= ndim
        return self if axis == ndim - 1 else self.reshape(*[-1 if i == axis else 1 for i in range(ndim)])

    @property
    def shape(self) -> tuple[Any, ...]:
        return shape(self.node)

    @property
    def ndim(self) -> int:
        return rank(self.node)


class Editor:
    """Edits of one pass over one program.

    New nodes stand before the anchor (`at`), except that what depends on parameters alone stands behind the last of
    its inputs, and no node is made twice.
    """

    def __init__(self, program: Program, pass_name: str, log: Log, *, named: bool = False, choice: Any = None) -> None:
        self.program = program
        self.named = named
        self.choice = choice
        self.pass_name = pass_name
        self.log = log
        self._anchor: fx.Node | None = None
        self._made: dict[Any, fx.Node] = {}
        self._firing: FiringKey | None = None
        self._replaced: dict[fx.Node, fx.Node] = {}

    # -- what may be done, and what was done

    def permit(self, anchor: fx.Node) -> bool:
        """May this site be rewritten? Not if verification has found this very rewrite to be wrong."""
        permitted = self.log.permit(self.pass_name, anchor)
        self._firing = self.log.permits[-1] if permitted else None
        return permitted

    def fired(self, node: fx.Node, *, before: str, after: str, group: fx.Node | None = None) -> None:
        """Record one rewrite; `group` is the anchor that `permit` was asked about, if it is another node."""
        self.log.fired(self.pass_name, node, before, after, group if group is not None else node)

    def fire(self, node: fx.Node) -> bool:
        """`permit` and `fired` in one, for a rule whose name says what the node becomes."""
        if not self.permit(node):
            return False
        self.fired(node, before=op_name(node), after=self.pass_name)
        return True

    def tell(self, key: tuple[str, str], text: str) -> None:
        """Record what was decided, once for each key."""
        self.log.told.setdefault(key, text)

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Record why a site that could have been rewritten was not."""
        self.log.refuse(self.pass_name, node, reason)

    # -- making nodes

    @contextlib.contextmanager
    def at(self, anchor: fx.Node) -> Generator[Editor]:
        """New nodes stand before `anchor` and tell its source line and module as theirs."""
        before, self._anchor = self._anchor, anchor
        try:
            yield self
        finally:
            self._anchor = before

    def value(self, node: fx.Node | Value) -> Value:
        return node if isinstance(node, Value) else Value(node, self)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Value:
        """A call of an operator in its canonical spelling; the same call made before is returned instead."""
        target, args, kwargs = spelt(target, _unwrap(args), _unwrap(kwargs), self._node)
        key = (target, _key(args), _key(kwargs))
        known = self._made.get(key)
        if known is not None and not known._erased and (self._anchor is None or is_weight(known) or known < self._anchor):
            return Value(known, self)
        node = self._create(target, args, kwargs)
        self._made[key] = node
        return Value(node, self)

    def _node(self, target: Any, *args: Any) -> fx.Node:
        return self.call(target, *args).node

    def op(self, name: str, *args: Any, **kwargs: Any) -> Value:
        """A call by the canonical name of the operator: `edit.op("linear", x, w, b)`."""
        return self.call(canonical(name), *args, **kwargs)

    def rebuild(self, node: fx.Node, /, **changed: Any) -> Value:
        """The same call with some arguments, by schema name, changed."""
        before = arguments(node)
        given = before | {name: _like(before[name], new) for name, new in changed.items()}
        parameters = parameters_of(node)
        args = [given[p.name] for p in parameters if not p.kwarg_only]
        kwargs = {p.name: given[p.name] for p in parameters if p.kwarg_only and given[p.name] is not None}
        return self.call(node.target, *args, **kwargs)

    def constant(self, tensor: Tensor, name: str) -> Value:
        """A tensor that is no part of the model (a rotation, scales from calibration), as a weight of the program."""
        taken, count = self.program.tensors, 1
        target = f"{self.pass_name}.{name}"
        while target in taken:
            count += 1
            target = f"{self.pass_name}.{name}{count}"
        taken[target] = tensor.detach()
        self.program.origins[target] = Origin((target,), "constant", persistent=False)
        first = next(n for n in self.program.graph.nodes if n.op != "placeholder")
        with self.program.graph.inserting_before(first):
            node = self.program.graph.create_node("get_attr", target, (), {}, name=target.replace(".", "_"))
        fake = self.program.fake_mode.from_tensor(tensor.detach(), static_shapes=True)
        node.meta = {"val": fake, "site_name": target}
        self.program.touch()
        return Value(node, self)

    def mark_weight(self, node: fx.Node) -> None:
        """`bake` shall evaluate this parameter-only node, although no pass made it."""
        node.meta["bake"] = True
        node.meta["firing"] = self._firing
        self.program.touch()

    def _create(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        graph, anchor = self.program.graph, self._anchor
        inputs: list[fx.Node] = []
        fx.map_arg((args, kwargs), inputs.append)
        fixed = all(is_weight(n) for n in inputs)  # a literal (ones, eye) is as fixed as a weight
        latest = max(inputs, default=next(iter(graph.nodes)))  # nodes compare by their place in the graph
        if fixed or anchor is None or not latest < anchor:
            scope = graph.inserting_after(_behind_inputs(latest))
        else:
            scope = graph.inserting_before(anchor)
        with scope:
            node = graph.call_function(target, args, kwargs)
        node.meta = self._meta(node, fixed)
        self.program.touch()
        return node

    def _meta(self, node: fx.Node, fixed: bool) -> dict[str, Any]:
        source = self._anchor
        kept = ("stack_trace", "nn_module_stack")
        meta = {k: source.meta[k] for k in kept if source is not None and k in source.meta}
        meta["val"] = self.infer(node)
        meta["made_by"] = self.pass_name
        meta["constant"] = fixed
        meta["firing"] = self._firing
        if source is not None:
            meta["anchor"] = anchor_name(source)
        return meta

    def infer(self, node: fx.Node) -> Any:
        """Shape and dtype of a call, on fake tensors."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
        with self.program.fake_mode, torch.no_grad():
            return invoke(node, args, kwargs)

    def refresh(self, node: fx.Node) -> None:
        """Derive anew what the node computes: one of its inputs has another shape now. Work in graph order."""
        node.meta["val"] = self.infer(node)
        self.program.touch()

    # -- replacing

    def replace(self, old: fx.Node, new: fx.Node | Value) -> fx.Node:
        """Every reader of `old` reads `new`; what nobody reads any more goes away."""
        node = new.node if isinstance(new, Value) else new
        node.meta.setdefault("anchor", anchor_name(old))
        self._replaced[old] = node
        self._remember(old)
        old.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self.program.touch()
        self.remove_dead(old)
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """What stands in the place of `node` now, if this pass has replaced it."""
        while node in self._replaced and node._erased:
            node = self._replaced[node]
        return node

    def replace_input(self, reader: fx.Node, old: fx.Node, new: fx.Node | Value) -> None:
        """One reader reads `new` instead of `old`."""
        self._remember(old)
        reader.replace_input_with(old, new.node if isinstance(new, Value) else new)
        self.program.touch()
        self.remove_dead(old)

    def _remember(self, old: fx.Node) -> None:
        if self._firing is not None:
            self.log.replaced.setdefault(anchor_name(old), set()).add(self._firing)

    def insert_behind(self, node: fx.Node, make: Callable[[Value], Value]) -> None:
        """Every reader of `node` reads `make(node)` instead."""
        old = list(node.users)
        with self.at(node.next):
            new = make(Value(node, self)).node
        for reader in old:
            reader.replace_input_with(node, new)
        self.program.touch()

    def remove_dead(self, node: fx.Node) -> None:
        """Erase a node that nothing reads, and then its inputs that only it read."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current._erased or current.users or current.op in ("placeholder", "output", "get_attr"):
                continue
            stack.extend(current.all_input_nodes)
            self.program.graph.erase_node(current)
            self.program.touch()


def _like(old: Any, new: Any) -> Any:
    """A weight times a float32 gain is float32; the operator wants it in the dtype that it had."""
    if not isinstance(new, Value) or not isinstance(old, fx.Node) or not is_weight(new.node):
        return new
    had, has = value(old), value(new.node)
    both = isinstance(had, Tensor) and isinstance(has, Tensor) and had.is_floating_point() and has.is_floating_point()
    return new.to(had.dtype) if both else new


def anchor_name(node: fx.Node) -> str:
    """The name, in the captured graph, of the node that this one stands for: stable over repeated runs."""
    return str(node.meta.get("anchor", node.name))


def canonical(name: str) -> Any:
    """The one operator that a name stands for in canonical graphs."""
    if hasattr(torch.ops.normfuse, name):
        return getattr(torch.ops.normfuse, name).default
    packet = getattr(aten, name)
    overload = _OVERLOADS.get(name, "default")
    return getattr(packet, overload)


_OVERLOADS = {
    "add": "Tensor", "sub": "Tensor", "mul": "Tensor", "div": "Tensor", "mean": "dim", "sum": "dim_IntList",
    "pow": "Tensor_Scalar", "transpose": "int", "softmax": "int", "to": "dtype", "slice": "Tensor", "select": "int",
    "flatten": "using_ints",
}  # fmt: skip


def _behind_inputs(node: fx.Node) -> fx.Node:
    """Placeholders come first in a graph: behind one of them means behind the last of them."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _unwrap(structure: Any) -> Any:
    if isinstance(structure, Value):
        return structure.node
    if isinstance(structure, tuple | list):
        return type(structure)(_unwrap(item) for item in structure)
    if isinstance(structure, dict):
        return {k: _unwrap(v) for k, v in structure.items()}
    return structure


def _key(structure: Any) -> Any:
    """Hashable, and 1 differs from 1.0 and from True."""
    if isinstance(structure, tuple | list):
        return tuple(_key(item) for item in structure)
    if isinstance(structure, dict):
        return tuple((k, _key(v)) for k, v in sorted(structure.items()))
    if isinstance(structure, Tensor):
        return id(structure)
    return (type(structure), structure)


def constant(program: Program, name: str, tensor: Tensor, *, like: str = "") -> fx.Node:
    """A tensor of the form's own, once per name; a parameter if it is made of one."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node  # type: ignore[no-any-return]
        if node.op == "call_function":
            break
    origin = program.origins.get(like)
    program.tensors[name] = tensor
    program.origins[name] = Origin((name,), origin.kind if origin else "buffer")
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        node = program.graph.create_node("get_attr", name, (), {}, name=name.replace(".", "_"))
    with program.fake_mode:
        node.meta = {"val": torch.empty(tensor.shape, dtype=tensor.dtype), "site_name": name}
    program.touch()
    return node
