"""What each spelling of the same thing costs on a provider: a table of measurements, and the tool that makes it anew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("costs.json")
"""By provider: for each question the microseconds of each answer, a geometric mean over sizes."""
_CALLS = 40


@cache
def table() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    told: dict[str, dict[str, dict[str, float]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return told


def cheapest(provider: str, question: str, among: Collection[str]) -> str:
    """The answer that took least on the provider; what nobody measured there is taken as on the CPU."""
    known = table().get(provider, {}).get(question) or table()["CPUExecutionProvider"][question]
    return min(among, key=known.__getitem__)


def told(provider: str, question: str) -> str:
    """A decision in words: what was chosen, and what the others cost."""
    measured = provider if question in table().get(provider, {}) else "CPUExecutionProvider"
    costs = sorted(table()[measured][question].items(), key=lambda item: item[1])
    return f"{question}: {', '.join(f'{answer} {cost:.0f} us' for answer, cost in costs)} ({measured})"


# -- measuring


def refresh(provider: str = "CPUExecutionProvider", *, tick: Callable[[str], None] = lambda _: None) -> None:
    """Measure every question on this machine, one thread, and write the table."""
    from normfuse.errors import LoweringError
    from normfuse.files import write_beside

    known: dict[str, Any] = dict(table()) if TABLE.exists() else {}
    known[provider] = measure(provider, tick=tick)
    table.cache_clear()
    with write_beside(TABLE, LoweringError) as beside:
        beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def measure(provider: str, *, tick: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for question, (answers, sizes) in QUESTIONS.items():
        tick(question)
        found[question] = {}
        for answer, build in answers.items():
            made = [build(*size) for size in sizes]
            times = [_microseconds(nodes, inputs, weights, provider) for nodes, inputs, weights in made]
            found[question][answer] = round(exp(sum(map(log, times)) / len(times)), 1)
    return found


def _microseconds(nodes: list[Any], inputs: dict[str, tuple[int, ...]], weights: dict[str, Any], provider: str) -> float:
    """The fastest of some calls: what others do on the machine only ever adds."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, numpy_helper

    helper = _helper()

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
    return 1e6 * min(taken)


def _helper() -> Any:
    from onnx import helper

    return helper


def _draw(*sizes: int) -> Any:
    import numpy as np

    return np.random.default_rng(sum(sizes)).standard_normal(sizes, np.float32)


def _residual(operator: str) -> Callable[[int, int], tuple[Any, ...]]:
    def build(rows: int, channels: int) -> tuple[Any, ...]:
        helper = _helper()

        nodes = [
            helper.make_node(operator, ["x", "y"], ["s"]),
            helper.make_node("LayerNormalization", ["s", "g", "b"], ["n"], axis=-1),
            helper.make_node("MatMul", ["n", "w"], ["o"]),
        ]
        inputs = {"x": (1, rows, channels), "y": (1, rows, channels)}
        return nodes, inputs, {"g": _draw(channels), "b": _draw(channels), "w": _draw(channels, 8)}

    return build


def _attention(batch: int, length: int, channels: int, heads: int) -> tuple[Any, ...]:
    helper = _helper()

    counts = {"q_num_heads": heads, "kv_num_heads": heads}
    return (
        [helper.make_node("Attention", ["q", "k", "v"], ["o"], **counts)],
        dict.fromkeys("qkv", (batch, length, channels)),
        {},
    )


def _multi_head(batch: int, length: int, channels: int, heads: int) -> tuple[Any, ...]:
    helper = _helper()

    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], num_heads=heads, domain="com.microsoft")
    return [node], dict.fromkeys("qkv", (batch, length, channels)), {}


def _products(batch: int, length: int, channels: int, heads: int) -> tuple[Any, ...]:
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


def _product(form: str) -> Callable[[int, int, int], tuple[Any, ...]]:
    def build(rows: int, inner: int, columns: int) -> tuple[Any, ...]:
        helper = _helper()

        weights = {"w": _draw(inner, columns), "b": _draw(columns)}
        if form == "Gemm":
            return [helper.make_node("Gemm", ["x", "w", "b"], ["o"])], {"x": (rows, inner)}, weights
        nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["o"])]
        return nodes, {"x": (1, rows, inner)}, weights

    return build


def _gelu(form: str) -> Callable[[int, int, int], tuple[Any, ...]]:
    def build(rows: int, inner: int, columns: int) -> tuple[Any, ...]:
        helper = _helper()

        product = helper.make_node("MatMul", ["x", "w"], ["m"])
        last = (
            [helper.make_node("BiasGelu", ["m", "b"], ["o"], domain="com.microsoft")]
            if form == "BiasGelu"
            else [helper.make_node("Add", ["m", "b"], ["a"]), helper.make_node("Gelu", ["a"], ["o"])]
        )
        return [product, *last], {"x": (1, rows, inner)}, {"w": _draw(inner, columns), "b": _draw(columns)}

    return build


_ROWS = ((128, 768), (198, 192), (784, 192))
_HEADS = ((1, 128, 768, 12), (1, 198, 192, 3), (1, 197, 768, 12), (64, 49, 96, 3), (4, 49, 384, 12), (4, 128, 768, 12))
_PRODUCTS = ((128, 768, 768), (198, 192, 192), (784, 192, 768), (3136, 96, 96))
QUESTIONS: Mapping[str, tuple[Mapping[str, Callable[..., tuple[Any, ...]]], tuple[tuple[int, ...], ...]]] = {
    "attention": ({"Attention": _attention, "MultiHeadAttention": _multi_head, "MatMul and Softmax": _products}, _HEADS),
    "sum before a norm": ({"Sum": _residual("Sum"), "Add": _residual("Add")}, _ROWS),
    "product with a bias": ({"MatMul and Add": _product("MatMul"), "Gemm": _product("Gemm")}, _PRODUCTS),
    "gelu after a bias": ({"Gelu": _gelu("Gelu"), "BiasGelu": _gelu("BiasGelu")}, _PRODUCTS),
}
