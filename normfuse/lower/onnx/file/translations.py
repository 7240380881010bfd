"""From operators of the ONNX form to ONNX nodes, for torch's exporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from normfuse.lower.onnx import operators
from normfuse.lower.onnx.file.functions import DOMAIN, Function

Table = dict[Any, Callable[..., Any]]
RUNTIME = "com.microsoft"
"""Operators that onnxruntime brings along; only `target="onnxruntime"` has them."""


def translations(opset: int, used: dict[str, Function]) -> Table:
    """The `custom_translation_table` of `torch.onnx.export` for our operators at this opset.

    `used` gets the functions that the file must hold.
    """
    from onnxscript import values

    op: Any = values.Opset("", opset)

    def function(x: Any, stem: str, axes: list[int], eps: float, options: str) -> Any:
        told = Function(stem, options, _is_half(x))
        used[told.name] = told
        given = {name: value for name, value in (("axes", axes), ("epsilon", eps)) if name in told.attributes}
        return _operator(DOMAIN, told.name, 1, told.attributes)(x, **given)

    def layer_norm(x: Any, weight: Any, bias: Any, axis: int, eps: float) -> Any:
        return op.LayerNormalization(x, weight, bias, axis=axis, epsilon=eps)[0]

    def rms_norm(x: Any, weight: Any, axis: int, eps: float) -> Any:
        if opset < 23:
            return op.Mul(function(x, "rms_norm", list(range(axis, 0)), eps, "{}"), weight)
        return op.RMSNormalization(x, weight, axis=axis, epsilon=eps)

    def instance_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return op.InstanceNormalization(x, weight, bias, epsilon=eps)

    def attention(q: Any, k: Any, v: Any, mask: Any, q_heads: int, kv_heads: int, causal: bool, scale: float) -> Any:
        counts = {"q_num_heads": q_heads, "kv_num_heads": kv_heads} if len(q.shape) == 3 else {}
        return op.Attention(q, k, v, mask, is_causal=int(causal), scale=scale, **counts)[0]

    def scaled_product(x: Any, y: Any, scale: float) -> Any:
        return _operator(RUNTIME, "FusedMatMul", 2, {"alpha": "FLOAT"})(x, y, alpha=scale)

    def bias_gelu(x: Any, bias: Any) -> Any:
        return _operator(RUNTIME, "BiasGelu", 2, {})(x, bias)

    def gemm(x: Any, weight: Any, bias: Any) -> Any:
        return op.Gemm(x, weight, bias, transB=1)

    def reshape(x: Any, sizes: list[int]) -> Any:
        return op.Reshape(x, op.Constant(value_ints=sizes))

    def total(x: Any, y: Any) -> Any:
        return op.Sum(x, y)

    def pad(x: Any, pads: list[int]) -> Any:
        axes = op.Constant(value_ints=[-1 - place for place in range(len(pads) // 2)])
        return op.Pad(x, op.Constant(value_ints=[*pads[::2], *pads[1::2]]), None, axes)

    def spread(x: Any, sides: list[int]) -> Any:
        scales = op.Constant(value_floats=[1.0, 1.0, *(float(side) for side in sides)])
        return op.Resize(x, None, scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")

    def global_average_pool(x: Any) -> Any:
        return op.GlobalAveragePool(x)

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
        operators.PAD.default: pad,
        operators.SPREAD.default: spread,
        operators.GLOBAL_AVERAGE_POOL.default: global_average_pool,
        operators.RESHAPE.default: reshape,
        operators.LAYER_NORM.default: layer_norm,
        operators.RMS_NORM.default: rms_norm,
        operators.INSTANCE_NORM.default: instance_norm,
        operators.FUNCTION.default: function,
        operators.ATTENTION.default: attention,
        operators.SCALED_PRODUCT.default: scaled_product,
        operators.BIAS_GELU.default: bias_gelu,
        operators.GEMM.default: gemm,
    }


def _is_half(x: Any) -> bool:
    return x.dtype.name in ("FLOAT16", "BFLOAT16")


def _operator(domain: str, name: str, inputs: int, attributes: Mapping[str, str]) -> Any:
    """An operator that onnx itself has no schema of."""
    from onnx.defs import OpSchema
    from onnxscript import values

    anything = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(f"x{i}", "T") for i in range(inputs)],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", anything, "")],
        attributes=[
            OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind), required=False) for key, kind in attributes.items()
        ],
    )
    return values.Op(values.Opset(domain, 1), name, schema)
