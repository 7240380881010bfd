"""One step of a benchmark in a process of its own: `reference`, `prepare` or `time`; prints one line of JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normfuse.named_model import Loaded

Call = Callable[[], Any]
FILES = {"onnx": "plain.onnx", "onnx-transformers": "transformers.onnx", "normfuse-onnxruntime": "normfuse.onnx"}
"""Contenders that are a file once they are prepared; a round then loads the file alone."""
_LEAST_CALLS = 4


def main(step: str, model: str, contender: str, batch: str, threads: str, seconds: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    work = Path(folder)
    with torch.no_grad():
        if step == "time" and contender in FILES:
            told = _time_file(work, contender, float(seconds))
        else:
            from normfuse.benchmark.models import load

            loaded = load(model, int(batch))
            if step == "reference":
                told = _reference(loaded, work, int(threads))
            elif step == "prepare":
                told = _PREPARE[contender](loaded, work)
            else:
                told = _time_model(loaded, contender, work, float(seconds))
    told["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(told))


# -- the model itself


def _reference(loaded: Loaded, work: Path, threads: int) -> dict[str, Any]:
    """Inputs and float64 outputs for the other steps, eager's own error, the work of one call, the machine's ceiling."""
    from torch.utils.flop_counter import FlopCounterMode

    from normfuse.benchmark.peers import matrix_ceiling
    from normfuse.capture.export import capture
    from normfuse.evaluate.float64 import run_float64

    counter = FlopCounterMode(display=False)
    with counter:
        own = loaded.model(*loaded.args, **loaded.kwargs)  # type: ignore[operator]
    program = capture(loaded.model, loaded.args, dict(loaded.kwargs))
    leaves = program.signature.flatten(loaded.args, loaded.kwargs)
    wanted = _tensors(run_float64(program, [leaves])[0])
    torch.save(wanted, work / "reference.pt")
    torch.save(_tensors((loaded.args, dict(loaded.kwargs))), work / "inputs.pt")
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "ceiling_gflops": matrix_ceiling(threads),
        "eager_error": _error(own, work),
        "outputs": [list(t.shape) for t in wanted],
    }


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _error(outputs: Any, work: Path) -> float:
    """The largest relative error of an output against float64."""
    wanted = torch.load(work / "reference.pt", weights_only=True)
    pairs = list(zip(_tensors(outputs), wanted, strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


# -- preparing a file: once per contender, its first call timed


def _prepare_onnx(loaded: Loaded, work: Path) -> dict[str, Any]:
    from normfuse.benchmark import peers

    started = time.perf_counter()
    peers.plain_export(loaded.model, loaded.args, loaded.kwargs, work / FILES["onnx"])  # type: ignore[arg-type]
    return _first_run(work, "onnx", started)


def _prepare_transformers(loaded: Loaded, work: Path) -> dict[str, Any]:
    from normfuse.benchmark import peers
    from normfuse.benchmark.models import MODEL_TYPES

    config: Any = loaded.model.config  # type: ignore[union-attr]
    heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
    heads = heads if isinstance(heads, int) else 0
    started = time.perf_counter()
    exported = work / "exported.onnx"
    peers.plain_export(loaded.model, loaded.args, loaded.kwargs, exported)  # type: ignore[arg-type]
    peers.transformers_optimizer(exported, work / FILES["onnx-transformers"], MODEL_TYPES[loaded.name], heads, width)
    exported.unlink()
    return _first_run(work, "onnx-transformers", started)


def _first_run(work: Path, contender: str, started: float) -> dict[str, Any]:
    outputs = _file_call(work, contender)()
    return {"first_call_seconds": time.perf_counter() - started, "error": _error(outputs, work)}


def _prepare_normfuse(loaded: Loaded, work: Path) -> dict[str, Any]:
    """The module as a user has it for the first call and the error, then the same program as a file for the rounds."""
    import normfuse
    from normfuse.benchmark import peers

    started = time.perf_counter()
    optimized = normfuse.optimize(
        loaded.model, loaded.args, loaded.kwargs, dynamic_shapes=None, backend="onnxruntime", verify=False
    )
    outputs = optimized(*loaded.args, **loaded.kwargs)
    first = time.perf_counter() - started
    told = {"first_call_seconds": first, "error": _error(outputs, work), "fired": optimized.report.fired}
    told["module_milliseconds"] = _milliseconds(lambda: optimized(*loaded.args, **loaded.kwargs), 1.5)
    report = optimized.export_onnx(work / FILES["normfuse-onnxruntime"])
    shares = peers.profile(work / FILES["normfuse-onnxruntime"], torch.load(work / "inputs.pt", weights_only=True))
    return told | {"operators": dict(report.operators), "decisions": list(report.decisions), "profile": shares}


_PREPARE: dict[str, Callable[[Loaded, Path], dict[str, Any]]] = {
    "onnx": _prepare_onnx,
    "onnx-transformers": _prepare_transformers,
    "normfuse-onnxruntime": _prepare_normfuse,
}


# -- timing


def _time_file(work: Path, contender: str, seconds: float) -> dict[str, Any]:
    call = _file_call(work, contender)
    return {"error": _error(call(), work), "milliseconds": _milliseconds(call, seconds)}


def _file_call(work: Path, contender: str) -> Call:
    from normfuse.benchmark import peers

    run = peers.session(work / FILES[contender])
    inputs = torch.load(work / "inputs.pt", weights_only=True)
    return lambda: run(*inputs)


def _time_model(loaded: Loaded, contender: str, work: Path, seconds: float) -> dict[str, Any]:
    started = time.perf_counter()
    model = _MODELS[contender](loaded)

    def call() -> Any:
        return model(*loaded.args, **loaded.kwargs)

    outputs = call()
    first = time.perf_counter() - started
    return {
        "first_call_seconds": first,
        "error": _error(outputs, work),
        "milliseconds": _milliseconds(call, seconds),
    }


def _milliseconds(call: Call, seconds: float) -> float:
    """Median of the calls of so many seconds, after a third of that to warm up."""
    _repeat(call, seconds / 3, 2)
    return 1e3 * median(_repeat(call, seconds, _LEAST_CALLS))


def _repeat(call: Call, seconds: float, least: int) -> list[float]:
    samples: list[float] = []
    while len(samples) < least or sum(samples) < seconds:
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return samples


def _inductor(loaded: Loaded) -> Any:
    return torch.compile(loaded.model)  # type: ignore[arg-type]


def _freezing(loaded: Loaded) -> Any:
    import torch._inductor.config as config

    config.freezing = True
    return _inductor(loaded)


def _normfuse(backend: str) -> Callable[[Loaded], Any]:
    def prepare(loaded: Loaded) -> Any:
        import normfuse

        return normfuse.optimize(loaded.model, loaded.args, loaded.kwargs, backend=backend, verify=False)

    return prepare


_MODELS: dict[str, Callable[[Loaded], Any]] = {
    "eager": lambda loaded: loaded.model,
    "inductor": _inductor,
    "inductor-freezing": _freezing,
    "normfuse-torch": _normfuse("torch"),
    "normfuse-inductor": _normfuse("inductor"),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
