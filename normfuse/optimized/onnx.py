"""An optimized model as an ONNX file, proved on the way: the form in float64, the file in onnxruntime."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normfuse.errors import LoweringError
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx.file.write import OnnxReport, check_request, write_form
from normfuse.lower.onnx.form import check_tensors, onnx_target
from normfuse.lower.onnx.run.proof import NotRun, run_file
from normfuse.lower.torch import graph_module, plain
from normfuse.pipeline.lowering import Lowered, judged, lower
from normfuse.verification.trials import Trials, make_trials

if TYPE_CHECKING:
    from normfuse.optimized.module import Optimized

TRIALS = 3
NOT_ASKED = "nobody asked for it"
NO_EXAMPLE = "there are no example inputs: normfuse.export_onnx takes them"
ITSELF = "the optimized model itself: what it was made from is gone or changed, and its weights are rounded once already"


def export(optimized: Optimized, path: str | Path, target: str, opset: int | None, verify: bool, example: Any) -> OnnxReport:
    """Lower from the weights as the model was given them, where they are still there, else from what they became."""
    choice = Choice(target, check_request(target, opset))
    program = optimized.unbaked()
    known = program is not None
    if program is None:
        program = optimized.as_it_is()
        check_tensors(program)
    trials = _trials(optimized, program, known, example) if verify else None
    lowered = lower(program, onnx_target(choice), trials, optimized.excluded)
    proof = _Proof(lowered, trials, "" if trials else NO_EXAMPLE if verify else NOT_ASKED)
    told = write_form(
        lowered.form, path, choice, list(lowered.log.told.values()), report=optimized.report, prove=proof.see
    )
    return dataclasses.replace(
        told,
        error_float64=lowered.error64,
        error_ratio=proof.ratio,
        not_verified=proof.missing,
        compared_with="" if known or trials is None else ITSELF,
        rolled_back=tuple(lowered.rolled_back),
    )


def _trials(optimized: Optimized, program: Program, known: bool, example: Any) -> Trials | None:
    """What the original computes; where that is gone, what the program computes itself."""
    source = optimized.source
    if source is not None and known:
        return source.trials(TRIALS)
    if example is not None:
        leaves = program.signature.flatten(*example)
    elif source is not None:
        leaves = source.example
    else:
        return None
    module = graph_module(plain(program, optimized.excluded))
    with torch.no_grad():
        return make_trials(program, lambda given: list(module(*given)), leaves, TRIALS)


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
