"""Reading one node of a canonical graph: its operator, its arguments by schema name, its shape, its place in the model.

Everything here is a pure question about a single `torch.fx.Node`; questions about the whole graph live in `analysis`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from normfuse.ops.traits import Trait, is_a

Dim = int | torch.SymInt

aten = torch.ops.aten


def is_op(node: Any, *targets: Any) -> bool:
    """True if `node` calls one of `targets`; an overload packet stands for all of its overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is t or (packet is not None and packet is t) for t in targets)


def op_name(node: fx.Node) -> str:
    """`layer_norm` for `aten.layer_norm.default`, `getitem` for Python operators, else the node's kind."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(node.target, "__name__", str(node.target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by schema name, defaults filled in, however the call was spelt."""
    return bound_arguments(node.target, node.args, node.kwargs)


def bound_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of a call that is no node yet."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    bound: dict[str, Any] = {}
    for position, parameter in enumerate(schema.arguments):
        if position < len(args):
            bound[parameter.name] = args[position]
        elif parameter.name in kwargs:
            bound[parameter.name] = kwargs[parameter.name]
        else:
            bound[parameter.name] = parameter.default_value if parameter.has_default_value() else None
    return bound


def argument(node: fx.Node, name: str) -> Any:
    """One argument by schema name."""
    return arguments(node)[name]


def node_argument(node: fx.Node, name: str) -> fx.Node:
    """An argument by schema name that is a node. Raises `TypeError` for one that is none."""
    return _a_node(argument(node, name), node, name)


def int_argument(node: fx.Node, name: str) -> int:
    """An argument by schema name that is a known number. Raises `TypeError` for one that is none."""
    found = argument(node, name)
    if not isinstance(found, int):
        raise TypeError(f"{name} of {node.name} is {found!r}, not a known number")
    return found


def ints_argument(node: fx.Node, name: str) -> list[int]:
    """Known numbers, however they were given: one number, several, or none at all."""
    found = argument(node, name)
    given = [] if found is None else [found] if isinstance(found, int) else list(found)
    if not all(isinstance(each, int) for each in given):
        raise TypeError(f"{name} of {node.name} is {found!r}, not known numbers")
    return given


def operand(node: fx.Node, place: int = 0) -> fx.Node:
    """A positional argument that is a node. Raises `TypeError` for one that is none."""
    return _a_node(node.args[place] if place < len(node.args) else None, node, str(place))


def operands(node: fx.Node, place: int = 0) -> list[fx.Node]:
    """A positional argument that is a list of nodes: what a concatenation puts together, what a program returns."""
    items = node.args[place]
    if not isinstance(items, list | tuple):
        raise TypeError(f"{place} of {node.name} is {items!r}, not a list")
    return [_a_node(item, node, str(place)) for item in items]


def _a_node(found: Any, node: fx.Node, name: str) -> fx.Node:
    if not isinstance(found, fx.Node):
        raise TypeError(f"{name} of {node.name} is {found!r}, not a node")
    return found


def place_in(getitem: fx.Node) -> int:
    """Which of several results a `getitem` takes."""
    index = getitem.args[1]
    if not isinstance(index, int):
        raise TypeError(f"{getitem.name} takes {index!r}, not a known place")
    return index


def invoke(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The operator of a call on other arguments: values, fake values, labels."""
    target: Any = node.target
    return target(*args, **kwargs)


def parameters_of(node: fx.Node) -> Sequence[Any]:
    """The arguments of the schema of the operator that a node calls."""
    target: Any = node.target
    return target._schema.arguments  # type: ignore[no-any-return]


def value(node: Any) -> Any:
    """What the node computes, as the exporter saw it: a fake tensor, a symbolic size, or a tuple of them."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(value(node), torch.Tensor) and isinstance(node, fx.Node)


def shape(node: fx.Node) -> tuple[Dim, ...]:
    """The (possibly symbolic) shape of a tensor node; empty for what is not a tensor."""
    v = value(node)
    return tuple(_settled(s) for s in v.shape) if isinstance(v, torch.Tensor) else ()


def _settled(size: Dim) -> Dim:
    """A size that the exporter first took to be free and then found to be fixed is an int."""
    if isinstance(size, int):
        return size
    known = size.node.expr
    return int(known) if known.is_number else size


def rank(node: fx.Node) -> int:
    v = value(node)
    return v.dim() if isinstance(v, torch.Tensor) else 0


def dtype(node: fx.Node) -> torch.dtype | None:
    v = value(node)
    return v.dtype if isinstance(v, torch.Tensor) else None


def expression(size: Any) -> Any:
    """A size as an int or a symbolic expression: comparing expressions never adds a guard, comparing SymInts may."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def same_size(a: Any, b: Any) -> bool:
    """Are two sizes equal for every input?"""
    difference: Any = expression(a) - expression(b)
    return bool(difference == 0 or (not isinstance(difference, int) and difference.expand() == 0))


def product(sizes: Iterable[Any]) -> Any:
    """Product of sizes as an int or an expression."""
    total: Any = 1
    for size in sizes:
        total = total * expression(size)
    return total


def is_one(size: Dim) -> bool:
    return isinstance(size, int) and size == 1


def positive_axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis



def readers(node: fx.Node) -> tuple[fx.Node, ...]:
    """Readers of the node's *values*; nodes that ask only for its shape do not count."""
    return tuple(user for user in node.users if not is_a(user, Trait.SHAPE_ONLY))


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    return (n for n in node.all_input_nodes if isinstance(value(n), (torch.Tensor, tuple, list)))


def is_getitem(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem


_TORCH_FILE = re.compile(r"[/\\]torch[/\\](nn|fx|_|utils|ao|autograd|export)")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_line(node: fx.Node) -> str | None:
    """`modeling_gpt2.py:305`: the innermost line of the user's code that made the node, where torch recorded one."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    for frame in reversed(frames):
        if not _TORCH_FILE.search(frame["file"]):
            name = re.split(r"[/\\]", frame["file"])[-1]
            return f"{name}:{frame['line']}"
    return None


def module_path(node: fx.Node) -> str:
    """Qualified name of the module whose forward made the node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    name = str(entries[-1][0]) if entries else ""
    name = re.sub(r"@\d+$", "", name)
    return name.removeprefix("L['self'].").removeprefix("L['self']")


def site(node: fx.Node) -> str:
    """A string by which a person finds the place in the model: module path, then source line."""
    where = module_path(node) or node.meta.get("site_name") or node.name
    line = source_line(node)
    return f"{where} ({line})" if line else str(where)


def is_weight(node: fx.Node) -> bool:
    """A tensor of the model, or a node that an editor has made out of such tensors alone."""
    return node.op == "get_attr" or bool(node.meta.get("constant"))
