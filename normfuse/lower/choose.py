"""Backends: what runs a program, and which of them runs it fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from normfuse.errors import LoweringError, NormfuseError
from normfuse.graph.program import Program
from normfuse.lower.target import Run, Target
from normfuse.lower.torch import device_of, fastest, graph_module, torch_target
from normfuse.rewrite.record import FiringKey

BACKENDS = ("torch", "inductor", "onnxruntime", "auto")

_WARM_UP = 3
_CALLS = 30
_SECONDS = 1.0


def check_backend(backend: str) -> None:
    """Raises `LoweringError` for a backend that does not exist or cannot run here."""
    kind, _, provider = backend.partition(":")
    if kind not in BACKENDS or (provider and kind != "onnxruntime"):
        raise LoweringError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}, onnxruntime:<provider>")
    if kind == "onnxruntime":
        from normfuse.lower.onnx.run.runtime import check_provider

        check_provider(provider)


def executable(program: Program, backend: str, excluded: frozenset[FiringKey] = frozenset()) -> Run:
    """The program made ready to run on flat leaves, for the device that its tensors are on now.

    Raises `LoweringError` where that cannot be done.
    """
    with refusing(f"backend {backend!r} cannot take this model"):
        return _executable(program, backend, excluded)


def call_once(run: Run, backend: str, leaves: Sequence[Any]) -> None:
    """What cannot be called says so now, by a `LoweringError`, and not to the first user."""
    with refusing(f"backend {backend!r} cannot be called here"), torch.no_grad():
        run(*leaves)


@contextmanager
def refusing(what: str) -> Generator[None]:
    """Whatever goes wrong is a `LoweringError` that says this."""
    try:
        yield
    except NormfuseError:
        raise
    except Exception as error:
        raise LoweringError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error in one line; its type where the message is not ours."""
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, NormfuseError) else f"{type(error).__name__}: {said}"


def _executable(program: Program, backend: str, excluded: frozenset[FiringKey]) -> Run:
    kind, _, provider = backend.partition(":")
    if kind == "onnxruntime":
        from normfuse.lower.onnx.run.runtime import Runtime

        return Runtime(program, provider, excluded=excluded)
    module = graph_module(fastest(program, device_of(program), excluded))
    return torch.compile(module) if kind == "inductor" else module


def target_of(backend: str, program: Program) -> Target:
    """What the backend lowers to, for the device that the program's tensors are on."""
    kind, _, provider = backend.partition(":")
    if kind == "onnxruntime":
        from normfuse.lower.onnx.run.runtime import runtime_target

        return runtime_target(provider)
    target = torch_target(device_of(program))
    return replace(target, name=kind, executable=_compiled) if kind == "inductor" else target


def _compiled(form: Program) -> Run:
    run: Run = torch.compile(graph_module(form))
    return run


@dataclass(frozen=True)
class Chosen:
    """The fastest way to run a program on an example, and the median seconds of each way that was tried."""

    backend: str
    run: Run
    seconds: Mapping[str, float]
    failures: Mapping[str, str]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in sorted(self.seconds.items(), key=lambda i: i[1]))
        return f"fastest on the example: {self.backend} ({times})"

    def notes(self) -> list[str]:
        """For the report: what was measured, and of each backend that was left out the reason."""
        return [str(self), *(f"backend {name!r} was left out: {reason}" for name, reason in self.failures.items())]


def choose(make: Callable[[str], Run], original: Run, leaves: Sequence[Any]) -> Chosen:
    """Measure every backend, as `make` makes it run, and the model itself ("original") on the example inputs.

    The original stays if it is fastest. A backend that `make` refuses, or that cannot be called, is told with the reason.
    """
    runs: dict[str, Run] = {"original": original}
    failures: dict[str, str] = {}
    seconds = {"original": _measure(original, leaves)}
    for backend in ("torch", "onnxruntime", "inductor"):
        try:
            check_backend(backend)
            runs[backend] = make(backend)
            seconds[backend] = _measure(runs[backend], leaves)
        except Exception as error:  # a backend that cannot run this model is no candidate, whatever its reason
            failures[backend] = _reason(error)
    best = min(seconds, key=seconds.__getitem__)
    return Chosen(best, runs[best], seconds, failures)


def _measure(run: Run, leaves: Sequence[Any]) -> float:
    """Median seconds of a call, in peace: other backends' threads spin for a while after their last call."""
    cuda = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)
    with torch.no_grad():
        for _ in range(_WARM_UP):
            run(*leaves)
        time.sleep(0.05)
        taken: list[float] = []
        while len(taken) < _CALLS and (len(taken) < 5 or sum(taken) < _SECONDS):
            started = time.perf_counter()
            run(*leaves)
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    return median(taken)
