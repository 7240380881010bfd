"""From operators of the ONNX form to ONNX nodes, for torch's exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normfuse.lower.onnx import operators

Table = dict[Any, Callable[..., Any]]
DOMAIN = "normfuse"
RUNTIME = "com.microsoft"
"""Operators that onnxruntime brings along; only `target="onnxruntime"` has them."""


def translations(opset: int) -> Table:
    """The `custom_translation_table` of `torch.onnx.export` for our operators at this opset."""
    from onnxscript import values

    op: Any = values.Opset("", opset)
    function = _operator(DOMAIN, "RMSNorm", inputs=2, axes="INTS", epsilon="FLOAT") if opset < 23 else None

    def layer_norm(x: Any, weight: Any, bias: Any, axis: int, eps: float) -> Any:
        return op.LayerNormalization(x, weight, bias, axis=axis, epsilon=eps)[0]

    def rms_norm(x: Any, weight: Any, axis: int, eps: float) -> Any:
        if function is not None:
            return function(x, weight, axes=list(range(axis, 0)), epsilon=eps)
        return op.RMSNormalization(x, weight, axis=axis, epsilon=eps)

    def attention(q: Any, k: Any, v: Any, mask: Any, q_heads: int, kv_heads: int, causal: bool, scale: float) -> Any:
        counts = {"q_num_heads": q_heads, "kv_num_heads": kv_heads} if len(q.shape) == 3 else {}
        return op.Attention(q, k, v, mask, is_causal=int(causal), scale=scale, **counts)[0]

    def scaled_product(x: Any, y: Any, scale: float) -> Any:
        return _operator(RUNTIME, "FusedMatMul", inputs=2, alpha="FLOAT")(x, y, alpha=scale)

    def bias_gelu(x: Any, bias: Any) -> Any:
        return _operator(RUNTIME, "BiasGelu", inputs=2)(x, bias)

    def gemm(x: Any, weight: Any, bias: Any) -> Any:
        return op.Gemm(x, weight, bias, transB=1)

    def reshape(x: Any, sizes: list[int]) -> Any:
        return op.Reshape(x, op.Constant(value_ints=sizes))

    def total(x: Any, y: Any) -> Any:
        return op.Sum(x, y)

    def grouped_mm(x: Any, weights: Any, ends: Any) -> Any:
        axis, start = op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
        places, products = op.Cast(ends, to=7), []
        for expert, weight in enumerate(weights):
            end = op.Slice(places, op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1]), axis)
            products.append(op.MatMul(op.Slice(x, start, end, axis), weight))
            start = end
        left = op.Slice(x, start, op.Constant(value_ints=[2**62]), axis)
        sizes = op.Concat(op.Shape(left, start=0, end=1), op.Shape(weights[0], start=1, end=2), axis=0)
        nothing = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), sizes)
        return op.Concat(*products, nothing, axis=0)

    def fourier(x: Any, axes: list[int], imaginary: bool) -> Any:
        last = op.Constant(value_ints=[-1])
        y = op.Unsqueeze(op.Cast(x, to=11), last)
        for axis in axes:
            y = op.DFT(y, None, op.Constant(value_int=axis)) if opset >= 20 else op.DFT(y, axis=axis)
        return op.CastLike(op.Gather(y, op.Constant(value_int=int(imaginary)), axis=-1), x)

    return {
        operators.FOURIER.default: fourier,
        operators.GROUPED_MM.default: grouped_mm,
        operators.SUM.default: total,
        operators.RESHAPE.default: reshape,
        operators.LAYER_NORM.default: layer_norm,
        operators.RMS_NORM.default: rms_norm,
        operators.ATTENTION.default: attention,
        operators.SCALED_PRODUCT.default: scaled_product,
        operators.BIAS_GELU.default: bias_gelu,
        operators.GEMM.default: gemm,
    }


def _operator(domain: str, name: str, *, inputs: int, optional: int = 0, **attributes: str) -> Any:
    """An operator that onnx itself has no schema of: the first `inputs` are required, `optional` more may be left out."""
    from onnx.defs import OpSchema
    from onnxscript import values

    kinds = ["T"] * inputs + ["S"] * optional
    parameters = [
        OpSchema.FormalParameter(
            f"x{i}",
            kind,
            param_option=OpSchema.FormalParameterOption.Single if i < inputs else OpSchema.FormalParameterOption.Optional,
        )
        for i, kind in enumerate(kinds)
    ]
    anything = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double", "int32", "int64", "bool")]
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", anything, ""), *([("S", anything, "")] if optional else [])],
        attributes=[
            OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind), required=False) for key, kind in attributes.items()
        ],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


_BODIES = {
    "RMSNorm": """
        <opset_import: ["" : {opset}], domain: "normfuse">
        RMSNorm <axes, epsilon> (x, weight) => (y) {{
            wide = Cast <to = 1> (x)
            axis = Constant <value_ints: ints = @axes> ()
            squares = Mul (wide, wide)
            mean = ReduceMean (squares, axis)
            small = Constant <value_float: float = @epsilon> ()
            sum = Add (mean, small)
            root = Sqrt (sum)
            unit = Div (wide, root)
            narrow = CastLike (unit, x)
            y = Mul (narrow, weight)
        }}
    """
}


def add_functions(model: Any, opset: int) -> None:
    """Bodies of standard operators for the operators of our own domain that the model calls."""
    import onnx.parser
    import onnx_ir as ir

    for name in {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_BODIES[name].format(opset=opset)))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
