"""Measuring what each spelling costs in onnxruntime: the table that `lower.costs` answers from."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from normfuse.lower.costs import TABLE, Costs, Size, table

_ROUNDS, _CALLS = 4, 15


def refresh(provider: str = "CPUExecutionProvider", *, tick: Callable[[str], None] = lambda _: None) -> None:
    """Measure every question on this machine, one thread, and write the table."""
    from normfuse.errors import LoweringError
    from normfuse.files import write_beside

    known: dict[str, Any] = dict(table()) if TABLE.exists() else {}
    known[provider] = measure(provider, tick=tick)
    table.cache_clear()
    with write_beside(TABLE, LoweringError) as beside:
        beside.write_text(_lines(known), encoding="utf-8")


def _lines(known: Mapping[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    joined = re.sub(r"(?<=[\[\d,])\s+(?=[\d\]])", "", json.dumps(known, indent=1))
    return re.sub(r",(?=\S)", ", ", joined) + "\n"


def measure(provider: str, *, tick: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for question, (answers, sizes) in QUESTIONS.items():
        tick(question)
        columns = [_fastest(answers, size, provider) for size in sizes]
        found[question] = {"sizes": sizes, "costs": {answer: [at[answer] for at in columns] for answer in answers}}
    return found


Spelling = tuple[list[Any], dict[str, Size], dict[str, Any]]
"""Nodes, the inputs' sizes, weights."""


def _fastest(answers: Mapping[str, Callable[..., Spelling]], size: Size, provider: str) -> Costs:
    """Each answer in turn, several times over: a machine that slows down does so for all of them."""
    rounds = [{a: _microseconds(build(*size), provider) for a, build in answers.items()} for _ in range(_ROUNDS)]
    return {answer: min(each[answer] for each in rounds) for answer in answers}


def _microseconds(spelling: Spelling, provider: str) -> float:
    """The fastest of some calls: what others do on the machine only ever adds."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, numpy_helper

    helper = _helper()

    nodes, inputs, weights = spelling
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    result = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", values, [result], [numpy_helper.from_array(v, n) for n, v in weights.items()])
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    draw = np.random.default_rng(0)
    feeds = {name: draw.standard_normal(size, np.float32) for name, size in inputs.items()}
    taken: list[float] = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        session.run(None, feeds)
        taken.append(time.perf_counter() - started)
    return round(1e6 * min(taken), 1)


def _helper() -> Any:
    from onnx import helper

    return helper


def _draw(*sizes: int) -> Any:
    import numpy as np

    return np.random.default_rng(sum(sizes)).standard_normal(sizes, np.float32)


def _residual(operator: str) -> Callable[[int, int], Spelling]:
    def build(rows: int, channels: int) -> Spelling:
        helper = _helper()

        nodes = [
            helper.make_node(operator, ["x", "y"], ["s"]),
            helper.make_node("LayerNormalization", ["s", "g", "b"], ["n"], axis=-1),
            helper.make_node("MatMul", ["n", "w"], ["o"]),
        ]
        inputs = {"x": (1, rows, channels), "y": (1, rows, channels)}
        return nodes, inputs, {"g": _draw(channels), "b": _draw(channels), "w": _draw(channels, 8)}

    return build


def _attention(batch: int, length: int, channels: int, heads: int) -> Spelling:
    helper = _helper()

    counts = {"q_num_heads": heads, "kv_num_heads": heads}
    return (
        [helper.make_node("Attention", ["q", "k", "v"], ["o"], **counts)],
        dict.fromkeys("qkv", (batch, length, channels)),
        {},
    )


def _multi_head(batch: int, length: int, channels: int, heads: int) -> Spelling:
    helper = _helper()

    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], num_heads=heads, domain="com.microsoft")
    return [node], dict.fromkeys("qkv", (batch, length, channels)), {}


def _products(batch: int, length: int, channels: int, heads: int) -> Spelling:
    import numpy as np

    helper = _helper()

    width = channels // heads
    nodes: list[Any] = []
    for name in "qkv":
        order = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}r"]))
        nodes.append(helper.make_node("Transpose", [f"{name}r"], [f"{name}t"], perm=order))
    nodes += [
        helper.make_node("FusedMatMul", ["qt", "kt"], ["s"], alpha=width**-0.5, domain="com.microsoft"),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "vt"], ["y"]),
        helper.make_node("Transpose", ["y"], ["yt"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["yt", "join"], ["o"]),
    ]
    shapes = {"split": np.array([batch, length, heads, width]), "join": np.array([batch, length, channels])}
    return nodes, dict.fromkeys("qkv", (batch, length, channels)), shapes


def _gelu(form: str) -> Callable[[int, int, int], Spelling]:
    def build(rows: int, inner: int, columns: int) -> Spelling:
        helper = _helper()

        product = helper.make_node("MatMul", ["x", "w"], ["m"])
        last = (
            [helper.make_node("BiasGelu", ["m", "b"], ["o"], domain="com.microsoft")]
            if form == "BiasGelu"
            else [helper.make_node("Add", ["m", "b"], ["a"]), helper.make_node("Gelu", ["a"], ["o"])]
        )
        return [product, *last], {"x": (1, rows, inner)}, {"w": _draw(inner, columns), "b": _draw(columns)}

    return build


def _grouped(apart: bool) -> Callable[[int, int, int, int], Spelling]:
    """Between two convolutions over all channels, as such ones stand in models: the layout they leave is part of it."""

    def build(groups: int, per_group: int, kernel: int, side: int) -> Spelling:
        helper = _helper()

        count = per_group if apart else 1
        each = groups * per_group // count
        window = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": groups}
        weights = {"before": _draw(groups, 16, 1, 1), "after": _draw(16, groups * per_group, 1, 1)}
        weights |= {f"w{i}": _draw(each, 1, kernel, kernel) for i in range(count)}
        nodes = [helper.make_node("Conv", ["x", "before"], ["b"])]
        nodes += [helper.make_node("Conv", ["b", f"w{i}"], [f"y{i}"], **window) for i in range(count)]
        nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(count)], ["y"], axis=1))
        nodes.append(helper.make_node("Conv", ["y", "after"], ["o"]))
        return nodes, {"x": (1, 16, side, side)}, weights

    return build


def _gated(spread: bool) -> Callable[[int, int], Spelling]:
    """Squeeze and excite between two convolutions, the second one's input added to its output."""

    def build(channels: int, side: int) -> Spelling:
        import numpy as np

        helper = _helper()

        weights = {"before": _draw(channels, 16, 1, 1), "down": _draw(16, channels, 1, 1), "up": _draw(channels, 16, 1, 1)}
        weights |= {"after": _draw(channels, 1, 3, 3)}
        nodes = [helper.make_node("Conv", ["x", "before"], ["b"])]
        if spread:
            nodes.append(helper.make_node("GlobalAveragePool", ["b"], ["mean"]))
        else:
            weights["axes"] = np.array([2, 3])
            nodes.append(helper.make_node("ReduceMean", ["b", "axes"], ["mean"], keepdims=1))
        nodes += [
            helper.make_node("Conv", ["mean", "down"], ["low"]),
            helper.make_node("Relu", ["low"], ["active"]),
            helper.make_node("Conv", ["active", "up"], ["high"]),
            helper.make_node("Sigmoid", ["high"], ["gate"]),
        ]
        if spread:
            weights["scales"] = np.array([1, 1, side, side], np.float32)
            way = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            nodes.append(helper.make_node("Resize", ["gate", "", "scales"], ["spread"], **way))
        nodes += [
            helper.make_node("Mul", ["b", "spread" if spread else "gate"], ["y"]),
            helper.make_node("Conv", ["y", "after"], ["z"], pads=[1] * 4, group=channels),
            helper.make_node("Add", ["y", "z"], ["o"]),
        ]
        return nodes, {"x": (1, 16, side, side)}, weights

    return build


_ROWS = ((128, 768), (197, 192), (784, 192))


_HEADS = (
    (1, 128, 768, 12), (1, 197, 192, 3), (1, 197, 768, 12), (64, 49, 96, 3), (4, 49, 384, 12), (4, 128, 768, 12),
    (8, 197, 192, 3), (512, 49, 96, 3),
)  # fmt: skip


_HIDDEN = (
    (128, 768, 3072), (197, 192, 768), (49, 768, 3072), (196, 384, 1536), (784, 192, 768), (3136, 96, 384),
    (1024, 768, 3072), (1576, 192, 768), (25088, 96, 384),
)  # fmt: skip


_GROUPED = ((48, 2, 7, 32), (96, 2, 7, 16), (192, 2, 7, 8), (64, 2, 3, 28), (32, 4, 3, 56))


_GATED = ((48, 56), (96, 28), (192, 14), (384, 7), (96, 112), (672, 14))


QUESTIONS: Mapping[str, tuple[Mapping[str, Callable[..., Spelling]], tuple[Size, ...]]] = {
    "attention": ({"Attention": _attention, "MultiHeadAttention": _multi_head, "MatMul and Softmax": _products}, _HEADS),
    "sum before a norm": ({"Sum": _residual("Sum"), "Add": _residual("Add")}, _ROWS),
    "gelu after a bias": ({"Gelu": _gelu("Gelu"), "BiasGelu": _gelu("BiasGelu")}, _HIDDEN),
    "grouped convolution": ({"Conv": _grouped(False), "depthwise Conv and Concat": _grouped(True)}, _GROUPED),
    "gate on channels": ({"Mul": _gated(False), "Resize and Mul": _gated(True)}, _GATED),
}
"""What is decided by measuring: the answers, and the sizes to ask at: (batch, length, channels, heads), (rows, channels),
(rows, channels, hidden channels), (groups, outputs per group, kernel, side of the output), (channels, side)."""
