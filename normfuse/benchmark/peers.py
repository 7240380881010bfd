"""What others make of a model on the way to onnxruntime: the peers of the benchmark, each at its best settings."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.lower.onnx.run.runtime import session_options


def plain_export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path) -> None:
    """torch's own exporter at its defaults."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, str(path), kwargs=dict(kwargs), dynamo=True, external_data=False, verbose=False)


def transformers_optimizer(path: Path, target: Path, model_type: str, heads: int, width: int) -> None:
    """onnxruntime.transformers' optimizer on an exported file."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimized = optimize_model(str(path), model_type=model_type, num_heads=heads, hidden_size=width, opt_level=0)
    optimized.save_model_to_file(str(target))


def session(path: Path) -> Callable[..., list[Tensor]]:
    """A file in onnxruntime as a function of the model's own call."""
    import onnxruntime

    made = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    names = [i.name for i in made.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feeds = {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}
        return [torch.from_numpy(result) for result in made.run(None, feeds)]

    return run


def profile(path: Path, inputs: Sequence[Tensor], calls: int = 20) -> dict[str, float]:
    """By operator its part of the time that kernels take in onnxruntime, the largest first: medians of so many calls."""
    import onnxruntime

    options = session_options()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {i.name: leaf.numpy() for i, leaf in zip(made.get_inputs(), inputs, strict=True)}
        for _ in range(calls):
            made.run(None, feeds)
        events = json.loads(Path(made.end_profiling()).read_text(encoding="utf-8"))
    taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"])
    by_operator: Counter[str] = Counter()
    for (operator, _), durations in taken.items():
        by_operator[operator] += median(durations)  # type: ignore[assignment]
    whole = sum(by_operator.values()) or 1
    return {operator: round(time / whole, 4) for operator, time in by_operator.most_common()}


def matrix_ceiling(threads: int) -> float:
    """GFLOP/s of onnxruntime's own matrix product with its weight prepacked: what no model can exceed."""
    import time

    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, inner, columns = 512, 1024, 1024
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((inner, columns), np.float32), "w")
    io_ = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [rows, c]) for n, c in (("x", inner), ("y", columns))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", io_[:1], io_[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert isinstance(model, onnx.ModelProto)
    options = session_options()
    options.intra_op_num_threads = threads
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = {"x": np.ones((rows, inner), np.float32)}
    best = 1e9
    for _ in range(60):
        started = time.perf_counter()
        made.run(None, x)
        best = min(best, time.perf_counter() - started)
    return 2e-9 * rows * inner * columns / best
