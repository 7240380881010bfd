"""Optimized: the module that `optimize` returns."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from normfuse.capture.export import capture
from normfuse.errors import NormfuseError
from normfuse.graph.program import Program
from normfuse.lower.choose import Run, call_once, executable
from normfuse.lower.torch import graph_module, plain
from normfuse.ops.tracing import TRACING
from normfuse.optimized.archive import conditions_of, load_exported, save, signature_of
from normfuse.pipeline.source import Source, state_of
from normfuse.progress import say
from normfuse.report import Report
from normfuse.rewrite.record import FiringKey
from normfuse.weights.watch import Watch

MIXTURE = (
    "normfuse: weights that are shared with the original model have changed, and those computed from it have not: results "
    "are a mixture of both; optimize again, or use optimize(..., copy=True) to share nothing"
)


class Optimized(nn.Module):
    """The optimized model: same call, same output structure, with a report of what was done.

    `graph_module` is the plain torch graph that it computes, called as the exported model is. `report` says what was
    rewritten where, what was refused and why, and how the result compares with the original.
    """

    def __init__(
        self,
        program: Program,
        report: Report,
        *,
        ledger: Program | None = None,
        backend: str = "torch",
        source: Source | None = None,
        excluded: frozenset[FiringKey] = frozenset(),
        shared: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.program = program
        self.report = report
        self.ledger = ledger
        self.backend = backend
        signature = program.signature
        names = [leaf.name for leaf in signature.leaves]
        codegen = _PyTreeCodeGen(_PyTreeInfo(names, signature.in_spec, signature.out_spec))
        self.source, self.excluded = source, excluded
        self.graph_module: fx.GraphModule = graph_module(plain(program, excluded), codegen)
        self.__dict__["_run"] = None
        self._states = {name: state_of(t) for name, t in self.tensors().items()}
        self.__dict__["_shared"] = Shared.of(self.tensors(), shared)
        self.train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._warn_of_mixture()
        leaves = self.program.signature.flatten(args, kwargs)
        if torch.compiler.is_exporting() and _traced(leaves):
            # An executable made now would hold the exporter's stand-ins for the weights; one made before, constants.
            flat = fx.Interpreter(self.graph_module).run(*leaves, enable_io_processing=False)
            return self.program.unflatten(list(flat))
        run = self.__dict__["_run"]
        run = self._lower() if run is None else run  # a compiled module has no truth value
        return self.program.unflatten(list(run(*leaves)))

    def _lower(self) -> Any:
        """The executable for the device that the weights are on now."""
        with TRACING:
            if self.__dict__["_run"] is None:
                here = {name: t for name, t in self.tensors().items() if name in self.program.tensors}
                self.__dict__["_run"] = executable(
                    dataclasses.replace(self.program, tensors=here), self.backend, self.excluded
                )
            return self.__dict__["_run"]

    def call_once(self, leaves: Sequence[Any]) -> None:
        """Make the executable and call it on these. Raises `LoweringError` with the reason where it cannot be."""
        call_once(self._lower(), self.backend, leaves)

    def run_with(self, run: Run, backend: str) -> None:
        """Run by this executable until the weights move; after that by `backend`."""
        self.backend = self.report.backend = backend
        self.__dict__["_run"] = run

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they are now."""
        return dict(self.graph_module.named_parameters()) | dict(self.graph_module.named_buffers())

    def _warn_of_mixture(self) -> None:
        if torch.compiler.is_compiling():
            return
        shared: Shared | None = self.__dict__["_shared"]
        if shared is None or shared.weights.unchanged():
            return
        if shared.others.unchanged():
            warnings.warn(MIXTURE, stacklevel=4)
        self.__dict__["_shared"] = Shared.of(self.tensors(), shared.names)

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        """Move the weights. Raises `NormfuseError` before any is moved for another dtype than they have."""
        for dtype in {t.dtype for t in self.tensors().values() if t.is_floating_point()}:
            if (to := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise NormfuseError(
                    f"an optimized model keeps its dtype ({dtype}): the graph was made and proved for it; "
                    f"convert the original with .to({to}) and optimize that"
                )
        before = {name: t.data_ptr() for name, t in self.tensors().items()}
        super()._apply(fn, recurse)
        if (shared := self.__dict__["_shared"]) is not None:
            stayed = {name for name, t in self.tensors().items() if t.data_ptr() == before[name]}
            self.__dict__["_shared"] = Shared.of(self.tensors(), shared.names & stayed)
        self.__dict__["_run"] = None  # the executable holds tensors of the old device or dtype
        return self

    def train(self, mode: bool = True) -> Optimized:
        """An optimized model is for inference: `train()` leaves it there."""
        return super().train(False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the archive that `save` writes: fake tensors and sessions do not travel."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "optimized.pt2")
            return _from_archive, ((Path(folder) / "optimized.pt2").read_bytes(),)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, {self.report.summary()}"

    def save(self, path: str | Path) -> None:
        """Write a `.pt2` archive that `normfuse.load` and `torch.export.load` both read.

        Raises `LoweringError` if the place cannot be written; a file that was there before is then as it was.
        """
        save(self.program, self.tensors(), self.report.to_dict(), self.backend, Path(path), self.excluded)

    @classmethod
    def load(cls, path: str | Path) -> Optimized:
        """What `save` wrote, or any other `.pt2` archive as it is. Raises `NormfuseError` for what is not such a file."""
        exported, extra = load_exported(Path(path))
        program = capture(exported)
        program.signature = dataclasses.replace(
            program.signature,
            parameters=signature_of(extra.get("parameters")),
            conditions=conditions_of(extra.get("conditions", []), program.signature.leaves) or program.signature.conditions,
        )
        report = Report.from_dict(extra.get("report", {}), model=Path(path).stem)
        return cls(program, report, backend=extra.get("backend", "torch"))

    def unbaked(self) -> Program | None:
        """The weight programs over the weights of the model that this was made from.

        None where the model is gone, or its weights or these have changed since.
        """
        same = {name: state_of(t) for name, t in self.tensors().items()} == self._states
        return self.source.weights() if self.source is not None and same else None

    def as_it_is(self) -> Program:
        """The program with its weights as they are now."""
        return dataclasses.replace(self.program, tensors={n: self.tensors()[n] for n in self.program.tensors})

    def export_onnx(
        self,
        path: str | Path,
        *,
        target: str = "onnxruntime",
        opset: int | None = None,
        verify: bool = True,
        example: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> Any:
        """Write the optimized program as ONNX; see `normfuse.export_onnx`.

        `example`: inputs (args, kwargs) to run the file on, for a model that was loaded and knows none.
        """
        from normfuse.optimized.onnx import Given, export

        say(f"export for {target}")
        unbaked = self.unbaked()
        given = Given(unbaked or self.as_it_is(), unbaked is not None, self.source, self.excluded, self.report)
        return export(given, Path(path), target, opset, verify, example)


@dataclasses.dataclass(frozen=True)
class Shared:
    """Weights whose memory is the original's, and the others, which were computed from the original's once."""

    names: frozenset[str]
    weights: Watch
    others: Watch

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], names: frozenset[str]) -> Shared | None:
        """None if there is no mixture to fear: nothing is shared, or everything."""
        known = {name: t for name, t in tensors.items() if t.device.type != "meta"}
        shared = [t for name, t in known.items() if name in names]
        others = [t for name, t in known.items() if name not in names]
        return cls(names, Watch(shared, sampled=False), Watch(others, sampled=False)) if shared and others else None


def _traced(leaves: list[Any]) -> bool:
    """Is it this call that is exported? The exporter's flag belongs to the process: another thread may have set it."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return torch.compiler.is_dynamo_compiling() or not tensors or any(isinstance(t, FakeTensor) for t in tensors)


def _from_archive(data: bytes) -> Optimized:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.pt2"
        path.write_bytes(data)
        return Optimized.load(path)
