"""An optimized model as an ONNX file, proved on the way: the form in float64, the file in onnxruntime."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normfuse.errors import LoweringError
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx.file.write import OnnxReport, check_request, write_form
from normfuse.lower.onnx.form import check_tensors, onnx_target
from normfuse.lower.onnx.run.proof import NotRun, run_file
from normfuse.lower.torch import graph_module, plain
from normfuse.pipeline.lowering import Lowered, judged, lower
from normfuse.pipeline.source import Source
from normfuse.report import Report
from normfuse.rewrite.record import FiringKey
from normfuse.verification.trials import Trials, make_trials

TRIALS = 3
NOT_ASKED = "nobody asked for it"
NO_EXAMPLE = "there are no example inputs: normfuse.export_onnx takes them"
ITSELF = "the optimized model itself: what it was made from is gone or changed, and its weights are rounded once already"


@dataclasses.dataclass(frozen=True)
class Given:
    """What is exported: a program, and where its weights are the model's own (not rounded yet), what it was made from."""

    program: Program
    unrounded: bool
    source: Source | None
    excluded: frozenset[FiringKey]
    report: Report


def export(given: Given, path: Path, target: str, opset: int | None, verify: bool, example: Any) -> OnnxReport:
    """Write the program as `normfuse.export_onnx` says; `example`: inputs (args, kwargs), or None."""
    choice = Choice(target, check_request(target, opset))
    check_tensors(given.program)
    trials = _trials(given, example) if verify else None
    lowered = lower(given.program, onnx_target(choice), trials, given.excluded)
    proof = _Proof(lowered, trials, "" if trials else NO_EXAMPLE if verify else NOT_ASKED)
    told = write_form(
        lowered.form, path, choice, list(lowered.log.told.values()), report=given.report, prove=proof.see
    )
    return dataclasses.replace(
        told,
        error_float64=lowered.error64,
        error_ratio=proof.ratio,
        not_verified=proof.missing,
        compared_with="" if given.unrounded or trials is None else ITSELF,
        rolled_back=tuple(lowered.rolled_back),
    )


def _trials(given: Given, example: Any) -> Trials | None:
    """What the original computes; where that is gone, what the program computes itself."""
    source, program = given.source, given.program
    if source is not None and given.unrounded:
        return source.trials(TRIALS)
    if example is not None:
        leaves = program.signature.flatten(*example)
    elif source is not None:
        leaves = source.example
    else:
        return None
    module = graph_module(plain(program, given.excluded))
    with torch.no_grad():
        return make_trials(program, lambda leaves: list(module(*leaves)), leaves, TRIALS)


@dataclasses.dataclass
class _Proof:
    """The file on the trials, before it is where the user wants it."""

    lowered: Lowered
    trials: Trials | None
    missing: str
    ratio: float | None = None

    def see(self, path: Path) -> None:
        if self.trials is None:
            return
        try:
            verdict = judged(partial(run_file, path, self.lowered.form), self.trials, self.lowered.error64 or 0.0)
        except NotRun as reason:
            self.missing = str(reason)
            return
        if not verdict:
            wrong = f"the ONNX file does not compute what the model does: {verdict.reason}"
            raise LoweringError(f"{wrong}; verify=False writes it nevertheless")
        self.ratio = verdict.error_ratio
