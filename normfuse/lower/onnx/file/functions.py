"""Norms that ONNX has no operator for: functions of our own domain, whose bodies any runtime can run.

A name says the norm and how it departs from the usual one: `LayerNormEpsOutsideUnbiased`, `L2NormRootFloor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

DOMAIN = "normfuse"
PLACES = {"inside": "", "outside": "EpsOutside", "clamp": "RootFloor", "floor": "SquareFloor"}
_ROOTS = {
    "inside": ("total = Add (square, small)", "root = Sqrt (total)"),
    "outside": ("total = Sqrt (square)", "root = Add (total, small)"),
    "clamp": ("total = Sqrt (square)", "root = Max (total, small)"),
    "floor": ("total = Max (square, small)", "root = Sqrt (total)"),
}
_COUNT = ("shape = Shape (x)", "sizes = Gather (shape, axes_)", "count = ReduceProd <keepdims = 0> (sizes)")
_SQUARES = {
    "mean": ("square = ReduceMean (squares, axes_)",),
    "sum": ("square = ReduceSum (squares, axes_)",),
    "unbiased": (
        *_COUNT,
        "less = Constant <value_int: int = @ddof> ()",
        "left = Sub (count, less)",
        "divisor = CastLike (left, d)",
        "sum = ReduceSum (squares, axes_)",
        "square = Div (sum, divisor)",
    ),
    "compressed": (
        *_COUNT,
        "one = Constant <value_int: int = 1> ()",
        "all = Add (count, one)",
        "divisor = CastLike (all, d)",
        "sum = ReduceSum (squares, axes_)",
        "last = ReduceSum (d, axes_)",
        "last_square = Mul (last, last)",
        "both = Add (sum, last_square)",
        "square = Div (both, divisor)",
    ),
}


@dataclass(frozen=True)
class Norm:
    """(x, weight) -> weight * d / root over `axes`, which are last; L2Norm has no weight, and any axes.

    `half`: statistics are taken in float32.
    """

    base: str
    place: str = "inside"
    unbiased: bool = False
    half: bool = False

    @property
    def name(self) -> str:
        return self.base + PLACES[self.place] + "Unbiased" * self.unbiased + "Half" * self.half

    @property
    def gained(self) -> bool:
        return self.base != "L2Norm"

    @property
    def attributes(self) -> dict[str, str]:
        return {"axes": "INTS", "epsilon": "FLOAT"} | ({"ddof": "INT"} if self.unbiased else {})

    def body(self, opset: int) -> str:
        mean = {"L2Norm": "sum", "CRMSNorm": "compressed"}.get(self.base, "unbiased" if self.unbiased else "mean")
        centred = ("centre = ReduceMean (wide, axes_)", "d = Sub (wide, centre)")
        lines = (
            "axes_ = Constant <value_ints: ints = @axes> ()",
            "wide = Cast <to = 1> (x)" if self.half else "wide = Identity (x)",
            *(centred if self.base == "LayerNorm" else ("d = Identity (wide)",)),
            "squares = Mul (d, d)",
            *_SQUARES[mean],
            "eps = Constant <value_float: float = @epsilon> ()",
            "small = CastLike (eps, d)",
            *_ROOTS[self.place],
            "unit = Div (d, root)",
            "narrow = CastLike (unit, x)",
            "y = Mul (narrow, weight)" if self.gained else "y = Identity (narrow)",
        )
        head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
        inputs = "x, weight" if self.gained else "x"
        return f"{head}{self.name} <{', '.join(self.attributes)}> ({inputs}) => (y) {{\n" + "\n".join(lines) + "\n}"


_ALL = {
    norm.name: norm
    for norm in (
        Norm(*told) for told in product(("LayerNorm", "RMSNorm", "L2Norm", "CRMSNorm"), PLACES, (False, True), (False, True))
    )
}


def add_functions(model: Any, opset: int) -> None:
    """Bodies of standard operators for the operators of our own domain that the model calls."""
    import onnx.parser
    import onnx_ir as ir

    for name in {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_ALL[name].body(opset)))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
