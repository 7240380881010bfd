"""One contender on one model in a process of its own; prints one line of JSON."""

from __future__ import annotations

import copy
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

from normfuse.benchmark.models import MODEL_TYPES, load
from normfuse.models_of import Loaded

Call = Callable[..., Any]
SECONDS, CALLS, WARM_UP = 4.0, 60, 5


def main(model: str, contender: str, batch: str, threads: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    loaded = load(model, int(batch))
    work = Path(folder)
    with torch.no_grad():
        if contender == "reference":
            print(json.dumps(_reference(loaded, work, int(threads))))
            return
        print(json.dumps(_measure(loaded, contender, work)))


def _measure(loaded: Loaded, contender: str, work: Path) -> dict[str, Any]:
    started = time.perf_counter()
    call = PREPARE[contender](loaded, work)
    outputs = call(*loaded.args, **loaded.kwargs)
    first = time.perf_counter() - started
    for _ in range(WARM_UP):
        call(*loaded.args, **loaded.kwargs)
    samples: list[float] = []
    while len(samples) < CALLS and (len(samples) < 10 or sum(samples) < SECONDS):
        began = time.perf_counter()
        call(*loaded.args, **loaded.kwargs)
        samples.append(time.perf_counter() - began)
    return {
        "milliseconds": 1e3 * median(samples),
        "first_call_seconds": first,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "error": _error(outputs, torch.load(work / "reference.pt", weights_only=True)),
    }


def _reference(loaded: Loaded, work: Path, threads: int) -> dict[str, Any]:
    """The float64 outputs, eager's own error against them, the work of one call, and the machine's ceiling."""
    from torch.utils.flop_counter import FlopCounterMode

    from normfuse.lower.onnx.peers import matrix_ceiling

    counter = FlopCounterMode(display=False)
    with counter:
        own = loaded.model(*loaded.args, **loaded.kwargs)  # type: ignore[operator]
    double: Any = copy.deepcopy(loaded.model).double()  # type: ignore[union-attr]
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (loaded.args, dict(loaded.kwargs))
    )
    wanted = _tensors(double(*args, **kwargs))
    torch.save(wanted, work / "reference.pt")
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "ceiling_gflops": matrix_ceiling(threads),
        "eager_error": _error(own, wanted),
    }


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _error(outputs: Any, wanted: list[Tensor]) -> float:
    """The largest relative error of an output against float64."""
    pairs = list(zip(_tensors(outputs), wanted, strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


# -- contenders: (model, folder) -> callable, ready to run


def _inductor(loaded: Loaded, work: Path) -> Call:
    return torch.compile(loaded.model)  # type: ignore[return-value, arg-type]


def _freezing(loaded: Loaded, work: Path) -> Call:
    import torch._inductor.config as config

    config.freezing = True
    return _inductor(loaded, work)


def _onnx(loaded: Loaded, work: Path) -> Call:
    from normfuse.lower.onnx import peers

    return peers.session(_plain_file(loaded, work))


def _plain_file(loaded: Loaded, work: Path) -> Path:
    from normfuse.lower.onnx import peers

    path = work / "plain.onnx"
    if not path.exists():
        peers.plain_export(loaded.model, loaded.args, loaded.kwargs, path)  # type: ignore[arg-type]
    return path


def _onnx_transformers(loaded: Loaded, work: Path) -> Call:
    from normfuse.lower.onnx import peers

    if loaded.name not in MODEL_TYPES:
        raise LookupError("onnxruntime.transformers has no model type for it")
    path = work / "transformers.onnx"
    if not path.exists():
        config: Any = loaded.model.config  # type: ignore[union-attr]
        heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
        heads = heads if isinstance(heads, int) else 0
        peers.transformers_optimizer(_plain_file(loaded, work), path, MODEL_TYPES[loaded.name], heads, width)
    return peers.session(path)


def _normfuse(backend: str) -> Callable[[Loaded, Path], Call]:
    def prepare(loaded: Loaded, work: Path) -> Call:
        import normfuse

        return normfuse.optimize(loaded.model, loaded.args, loaded.kwargs, backend=backend, verify=False)

    return prepare


PREPARE: dict[str, Callable[[Loaded, Path], Call]] = {
    "eager": lambda loaded, work: loaded.model,  # type: ignore[dict-item, return-value]
    "inductor": _inductor,
    "inductor-freezing": _freezing,
    "onnx": _onnx,
    "onnx-transformers": _onnx_transformers,
    "normfuse-torch": _normfuse("torch"),
    "normfuse-inductor": _normfuse("inductor"),
    "normfuse-onnxruntime": _normfuse("onnxruntime"),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
