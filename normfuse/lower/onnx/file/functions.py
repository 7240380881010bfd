"""Known functions that ONNX has no operator for: functions of our own domain, whose bodies any runtime can run.

A body is derived from the record: its reference, traced over one axis, in the few standard operators below. What holds of
one axis holds of several, because a row function is the same whatever the axes of its row are called.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.ops import Operator, operator_named

DOMAIN = "normfuse"
EPS_PLACEHOLDERS = (0.01234567, 0.07654321)
"""Two numbers for eps: a body that differs for them computes with eps what an attribute cannot say."""

aten = torch.ops.aten
_ONE = {
    aten.abs.default: "Abs", aten.neg.default: "Neg", aten.exp.default: "Exp", aten.log.default: "Log",
    aten.sqrt.default: "Sqrt", aten.tanh.default: "Tanh", aten.erf.default: "Erf", aten.sigmoid.default: "Sigmoid",
    aten.sign.default: "Sign", aten.reciprocal.default: "Reciprocal", aten.relu.default: "Relu",
}  # fmt: skip
_TWO = {
    aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div",
    aten.maximum.default: "Max", aten.minimum.default: "Min", aten.clamp_min.default: "Max",
    aten.clamp_max.default: "Min", aten.pow.Tensor_Scalar: "Pow", aten.pow.Tensor_Tensor: "Pow",
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul",
}  # fmt: skip
_OVER = {
    aten.mean.dim: "ReduceMean", aten.sum.dim_IntList: "ReduceSum", aten.amax.default: "ReduceMax",
    aten.amin.default: "ReduceMin",
}  # fmt: skip
_COUNT = ("shape = Shape (x)", "sizes = Gather (shape, axes_)", "count = ReduceProd <keepdims = 0> (sizes)")


class Underivable(Exception):
    """The reference uses what has no place in a body."""


@dataclass(frozen=True)
class Function:
    """f(x) over `axes`, without gain and shift; `options` are arguments that are not at their defaults, as JSON.

    `half`: the input has half precision, and statistics are taken wider.
    """

    stem: str
    options: str = "{}"
    half: bool = False

    @property
    def name(self) -> str:
        """`RMSNorm`, `StandardizeOutsideDdof1`: the stem and how it departs from the usual."""
        words = [_titled(word) for word in self.stem.split("_")]
        for key, told in json.loads(self.options).items():
            title = key.title()
            word = title * told or f"No{title}" if isinstance(told, bool) else f"{title}{told}"
            words.append(told.title() if isinstance(told, str) else word)
        return "".join(words) + "Half" * self.half

    @property
    def attributes(self) -> dict[str, str]:
        return {"axes": "INTS"} | ({"epsilon": "FLOAT"} if operator_named(self.stem).eps else {})

    def body(self, opset: int) -> str:
        """In the text form of ONNX. Raises `Underivable`."""
        record, options = operator_named(self.stem), json.loads(self.options)
        lines, *others = (_lines(record, options, eps, half=self.half) for eps in EPS_PLACEHOLDERS)
        if any(other != lines for other in others):
            raise Underivable(f"{self.stem} computes with eps before it meets a tensor")
        head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
        return f"{head}{self.name} <{', '.join(self.attributes)}> (x) => (y) {{\n" + "\n".join(lines) + "\n}"


def _titled(word: str) -> str:
    """What has no vowel is an acronym."""
    return word.title() if set(word) & set("aeiou") else word.upper()


@cache
def derivable(record: Operator, options: str) -> bool:
    """Has the function a body in standard operators?"""
    try:
        return record.alone and bool(Function(record.stem, options).body(18))
    except Underivable:
        return False


def _lines(record: Operator, options: Mapping[str, Any], eps: float, *, half: bool) -> list[str]:
    assert record.reference is not None
    function, told = record.reference, {**options, **({record.eps: eps} if record.eps else {})}

    def rows(x: Tensor) -> Tensor:
        return function(x, [-1], **told)

    try:
        traced = make_fx(rows, tracing_mode="symbolic")(torch.ones(2, 3, dtype=torch.float16 if half else torch.float32))
    except Exception as error:
        raise Underivable(f"{record.stem} cannot be traced: {error}") from error
    traced.graph.eliminate_dead_code()
    return _Body(eps if record.eps else None).lines(traced.graph)


class _Body:
    """The lines of one traced reference."""

    def __init__(self, eps: float | None) -> None:
        self.eps = eps
        self.text = ["axes_ = Constant <value_ints: ints = @axes> ()"]
        if eps is not None:
            self.text.append("eps = Constant <value_float: float = @epsilon> ()")
        self.names: dict[fx.Node, str] = {}

    def lines(self, graph: fx.Graph) -> list[str]:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = "x"
            elif node.op == "output":
                self._put("y", f"Identity ({self._tensor(node.args[0])})")
            elif node.op == "call_function":
                self.names[node] = self._call(node)
            else:
                raise Underivable(f"it reads a stored tensor {node.target}")
        return self.text

    def _put(self, name: str, call: str) -> str:
        self.text.append(f"{name} = {call}")
        return name

    def _new(self, call: str) -> str:
        return self._put(f"v{len(self.text)}", call)

    def _tensor(self, item: Any) -> str:
        if not isinstance(item, fx.Node):
            raise Underivable(f"{item!r} is no tensor")
        return self.names[item]

    def _call(self, node: fx.Node) -> str:
        target, args = node.target, node.args
        if target in _ONE:
            return self._new(f"{_ONE[target]} ({self._tensor(args[0])})")  # type: ignore[index]
        if target is aten.rsqrt.default:
            return self._new(f"Reciprocal ({self._new(f'Sqrt ({self._tensor(args[0])})')})")
        if target is aten.pow.Tensor_Scalar and args[1] == 2:
            return self._new(f"Mul ({self._tensor(args[0])}, {self._tensor(args[0])})")
        if target in _TWO and not node.kwargs and len(args) == 2:
            return self._new(f"{_TWO[target]} ({', '.join(self._operands(args))})")  # type: ignore[index]
        if target in _OVER and list(args[1]) in ([-1], [1]) and args[2:] == (True,) and not node.kwargs:  # type: ignore[call-overload]
            return self._new(f"{_OVER[target]} ({self._tensor(args[0])}, axes_)")  # type: ignore[index]
        if target is aten.sym_size.int and self._tensor(args[0]) == "x" and args[1] in (1, -1):
            self.text += [line for line in _COUNT if line not in self.text]
            return "count"
        if target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            return self._cast(node)
        raise Underivable(f"it uses {target}")

    def _cast(self, node: fx.Node) -> str:
        wide = node.kwargs["dtype"] == torch.float32
        source = self._tensor(node.args[0])
        return self._new(f"Cast <to = 1> ({source})" if wide else f"CastLike ({source}, x)")

    def _operands(self, args: Iterable[Any]) -> list[str]:
        """Numbers and counts take the dtype of the tensor beside them."""
        args = list(args)
        like = next((a for a in args if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor)), None)
        return [self._operand(a, None if like is None else self.names[like]) for a in args]

    def _operand(self, item: Any, like: str | None) -> str:
        if isinstance(item, fx.Node):
            number = not isinstance(item.meta["val"], Tensor)
            return self._new(f"CastLike ({self.names[item]}, {like})") if number and like else self.names[item]
        if like is None:
            return self._new(f"Constant <value_int: int = {int(item)}> ()")
        if item == self.eps:
            return self._new(f"CastLike (eps, {like})")
        return self._new(f"CastLike ({self._new(f'Constant <value = double {{{float(item)!r}}}> ()')}, {like})")


def add_functions(model: Any, opset: int, used: Mapping[str, Function]) -> None:
    """Bodies of standard operators for the operators of our own domain that the model calls."""
    import onnx.parser
    import onnx_ir as ir

    for name in {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(used[name].body(opset)))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
