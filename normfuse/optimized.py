"""Optimized: the module that `optimize` returns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from normfuse.errors import LoweringError
from normfuse.lower.torch import fastest, graph_module, plain
from normfuse.program import Program
from normfuse.report import Report

BACKENDS = ("torch", "inductor")


class Optimized(nn.Module):
    """The optimized model: same call, same output structure, with a report of what was done.

    `graph_module` is the plain torch graph that it computes, called as the exported model is. `report` says what was
    rewritten where, what was refused and why, and how the result compares with the original.
    """

    def __init__(self, program: Program, report: Report, *, ledger: Program | None = None, backend: str = "torch") -> None:
        super().__init__()
        self.program = plain_tensors_shared(program)
        self.report = report
        self.ledger = ledger
        self.backend = backend
        signature = program.signature
        names = [leaf.name for leaf in signature.leaves]
        codegen = _PyTreeCodeGen(_PyTreeInfo(names, signature.in_spec, signature.out_spec))
        self.graph_module: fx.GraphModule = graph_module(plain(program), codegen)
        self.__dict__["_run"] = None
        self.train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self.program.signature.flatten(args, kwargs)
        run = self.__dict__["_run"] or self._lower()
        return self.program.unflatten(list(run(*leaves)))

    def _lower(self) -> Any:
        """The executable for the device that the weights are on now."""
        device = next((t.device for t in self.tensors().values()), torch.device("cpu"))
        lowered = fastest(self.program, device)
        lowered.tensors = {name: t for name, t in self.tensors().items() if name in lowered.tensors}
        module = graph_module(lowered)
        run: Any = torch.compile(module) if self.backend == "inductor" else module
        self.__dict__["_run"] = run
        return run

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they are now."""
        return dict(self.graph_module.named_parameters()) | dict(self.graph_module.named_buffers())

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        super()._apply(fn, recurse)
        self.__dict__["_run"] = None  # the executable holds tensors of the old device or dtype
        return self

    def train(self, mode: bool = True) -> Optimized:
        """An optimized model is for inference: `train()` leaves it there."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, {self.report.summary()}"

    def save(self, path: str | Path) -> None:
        """Write a `.pt2` archive that `normfuse.load` and `torch.export.load` both read.

        Raises `LoweringError` if the place cannot be written; a file that was there before is then as it was.
        """
        from normfuse.archive import save

        save(self, Path(path))

    def export_onnx(self, path: str | Path, *, target: str = "onnxruntime", opset: int | None = None) -> Any:
        """Write the optimized program as ONNX; see `normfuse.export_onnx`."""
        from normfuse.lower.onnx import write_onnx

        program = dataclasses.replace(self.program, tensors={n: self.tensors()[n] for n in self.program.tensors})
        return write_onnx(program, Path(path), target=target, opset=opset, report=self.report)


def plain_tensors_shared(program: Program) -> Program:
    return program


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise LoweringError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
