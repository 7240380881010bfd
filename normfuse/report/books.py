"""The report of a run of the pipeline."""

from __future__ import annotations

import dataclasses

from normfuse.pipeline.run import Result, detached
from normfuse.report import Report
from normfuse.report.report import count_raised
from normfuse.weights.program import WeightProgram


def report_of(name: str, result: Result, backend: str, notes: tuple[str, ...]) -> Report:
    return Report(
        model=name,
        fired=result.log.counts(),
        refusals=[*result.log.refusals, *result.rolled_back],
        rewrites=result.log.rewrites,
        rolled_back=result.rolled_back,
        raised=count_raised(result.raised.rewrites),
        verification=result.verification,
        weights={k: _detach(v) for k, v in result.ledger.items()},
        notes=list(notes),
        backend=backend,
    )


def _detach(weight: WeightProgram) -> WeightProgram:
    return dataclasses.replace(weight, program=detached(weight.program))
