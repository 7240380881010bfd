"""Writing a program as an ONNX file: export, names, metadata, checks; beside its place first, then renamed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from normfuse.errors import LoweringError
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice
from normfuse.lower.exported import to_exported
from normfuse.lower.onnx.file.functions import Function, add_functions
from normfuse.lower.onnx.file.names import CONDITIONS, axis_names, name_values
from normfuse.lower.onnx.file.translations import translations
from normfuse.lower.onnx.form import check_tensors, onnx_target
from normfuse.lower.target import settled
from normfuse.ops.tracing import TRACING
from normfuse.rewrite.record import Log, Refusal
from normfuse.show.page import Column, Page, Section

TARGETS = ("onnxruntime", "onnx")
OPSET = 23
"""From here on RMSNormalization and Attention are standard operators."""
OPSETS = range(18, 24)
EMBEDDED = 1_500_000_000
"""Bytes of weights above which they go into a file of their own: protobuf ends at 2 GB."""



@dataclass(frozen=True)
class OnnxReport:
    """What was written: where, for which target, which operators how often, and how it is called.

    `conditions` must hold of the sizes: with others the model would have taken another branch. A file cannot check them.
    `error_float64` is the relative error of what the file was printed from, in float64; `error_ratio` that of the file
    itself, run in onnxruntime, in units of the original's own: of the model, or of what `compared_with` says. What was not
    measured is None, and `not_verified` says why.
    """

    path: Path
    target: str
    opset: int
    operators: Mapping[str, int]
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    bytes: int
    external_data: Path | None = None
    decisions: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    error_float64: float | None = None
    error_ratio: float | None = None
    not_verified: str = "nobody asked for it"
    compared_with: str = ""
    rolled_back: tuple[Refusal, ...] = ()

    def count(self, operator: str) -> int:
        """How many nodes of this operator type, whatever its domain."""
        return sum(n for name, n in self.operators.items() if name.rpartition("::")[2] == operator)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "target": self.target,
            "opset": self.opset,
            "operators": dict(self.operators),
            "inputs": {k: list(v) for k, v in self.inputs.items()},
            "outputs": {k: list(v) for k, v in self.outputs.items()},
            "bytes": self.bytes,
            "external_data": str(self.external_data) if self.external_data else None,
            "decisions": list(self.decisions),
            "conditions": list(self.conditions),
            "seconds": dict(self.seconds),
            "error_float64": self.error_float64,
            "error_ratio": self.error_ratio,
            "not_verified": self.not_verified,
            "compared_with": self.compared_with,
            "rolled_back": [asdict(r) for r in self.rolled_back],
        }

    def _verified(self) -> str:
        said = [] if self.error_float64 is None else [f"relative error {self.error_float64:.1e} in float64"]
        if self.error_ratio is not None:
            said.append(f"the file {self.error_ratio:.2f} of the original's own error")
        if said and self.compared_with:
            said.append(f"compared with {self.compared_with}")
        return ", ".join([*said, *([f"not run: {self.not_verified}"] if self.not_verified else [])])

    def __str__(self) -> str:
        from normfuse.show.terminal import render

        return render(self.page())

    def page(self) -> Page:
        """Everything above as one table."""
        sizes = [(label, f"{name}: [{', '.join(map(str, shape))}]") for label, values in
                 (("input", self.inputs), ("output", self.outputs)) for name, shape in values.items()]  # fmt: skip
        often = sorted(self.operators.items(), key=lambda item: -item[1])
        weights = f", weights in {self.external_data.name}" if self.external_data else ""
        rows = (
            *sizes,
            *(("right where", condition) for condition in self.conditions),
            ("operators", ", ".join(f"{name} {count}" for name, count in often)),
            *(("choice", decision) for decision in self.decisions),
            *(("rolled back", f"{r.pass_name} at {r.site}: {r.reason}") for r in self.rolled_back),
            ("verified", self._verified()),
            ("size", f"{self.bytes / 1e6:.1f} MB{weights}"),
            ("seconds", ", ".join(f"{name} {took:.2f}" for name, took in self.seconds.items())),
        )
        columns = (Column("", tone="dim"), Column("", wraps=True))
        return Page(f"{self.path}  (opset {self.opset}, {self.target})", (Section("", columns, rows),))


def write_onnx(
    program: Program,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    opset: int | None = None,
    report: Any = None,
    check: bool = True,
) -> OnnxReport:
    """Write the program as an ONNX file and check it; weights above 1.5 GB go into `<path>.data` beside it.

    `target="onnx"` uses standard operators alone; `"onnxruntime"` also those of its own that it runs faster. `report`
    goes into the file's metadata. Raises `LoweringError` for an unknown target or opset, a missing onnx package, an
    operator that ONNX lacks, and a place that cannot be written; then what was there before is as it was.
    """
    choice, log, started = Choice(target, check_request(target, opset)), Log(), time.perf_counter()
    check_tensors(program)
    form = onnx_target(choice).form(program, log)
    seconds = {"form": time.perf_counter() - started}
    return write_form(settled(form), path, choice, list(log.told.values()), report=report, check=check, seconds=seconds)


def write_form(
    form: Program,
    path: str | Path,
    choice: Choice,
    decisions: Sequence[str],
    *,
    report: Any = None,
    check: bool = True,
    seconds: Mapping[str, float] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> OnnxReport:
    """Write a program that is lowered and baked, as `write_onnx` does. `prove` sees the file before it is in its place."""
    started = time.perf_counter()
    model = build(form, choice, decisions, report)
    middle = time.perf_counter()
    external = save(model, Path(path), check=check, prove=prove)
    took = {**(seconds or {}), "export": middle - started, "write": time.perf_counter() - middle}
    return _report(model, Path(path), choice, decisions, external, took)


def check_request(target: str, opset: int | None) -> int:
    """The opset to write. Raises `LoweringError` for what cannot be asked for, before anything is done."""
    if target not in TARGETS:
        raise LoweringError(f"unknown ONNX target {target!r}: choose one of {', '.join(TARGETS)}")
    if opset is not None and opset not in OPSETS:
        raise LoweringError(f"cannot write opset {opset}: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise LoweringError(f"writing ONNX needs the package {error.name}: pip install 'normfuse[onnx]'") from None
    return opset or OPSET


def build(form: Program, choice: Choice, decisions: Sequence[str] = (), report: Any = None) -> Any:
    """A lowered and baked program as an onnx_ir model, with names and metadata."""
    model = _translate(form, choice)
    name_values(model, form)
    _describe(model, choice, decisions, report)
    if form.signature.conditions:
        told = [condition.told(axis_names(form)) for condition in form.signature.conditions]
        model.metadata_props[CONDITIONS] = json.dumps(told)
    return model


def _translate(form: Program, choice: Choice) -> Any:
    exported = to_exported(form)
    _settle(form)
    used: dict[str, Function] = {}
    try:
        with TRACING, _quiet(), torch.no_grad():
            written: Any = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=choice.opset,
                custom_translation_table=translations(choice.opset, used),
                verbose=False,
                optimize=False,  # its fusions are not exact: a rotary embedding whose tables serve every batch breaks
            )
            _clean(written.model)
    except Exception as error:
        raise LoweringError(f"the model cannot be written as ONNX: {_reason(error)}") from error
    add_functions(written.model, choice.opset, used)
    return written.model


def _settle(form: Program) -> None:
    """Sizes that depend on values are known by the graph's own nodes; none may be left over from making it."""
    pending = getattr(getattr(form.fake_mode, "shape_env", None), "pending_fresh_unbacked_symbols", None)
    if pending:
        pending.clear()


def _clean(model: Any) -> None:
    """Fold what is known, drop what nobody reads, tell things once."""
    import onnx_ir.passes as ir_passes
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    ir_passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: the exporter wraps it in its own stories."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The exporter tells of its progress and of packages that are not installed; neither concerns the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "onnx_ir")]
    loggers.append(logging.getLogger("torch.onnx._internal.exporter._registration"))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# -- metadata


def _describe(model: Any, choice: Choice, decisions: Sequence[str], report: Any) -> None:
    """Who wrote the file and what was done; the exporter's own notes hold paths of this machine and go."""
    from importlib.metadata import version

    known = version("normfuse")
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            kept = {k: v for k, v in node.metadata_props.items() if k == "namespace"}
            node.metadata_props.clear()
            node.metadata_props.update(kept)
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
    model.producer_name, model.producer_version = "normfuse", known
    model.metadata_props["normfuse.version"] = known
    model.metadata_props["normfuse.target"] = choice.target
    if decisions:
        model.metadata_props["normfuse.decisions"] = json.dumps(list(decisions))
    if report is not None:
        model.metadata_props["normfuse.report"] = json.dumps(_summary(report), default=str)


def _summary(report: Any) -> dict[str, Any]:
    told = report.to_dict()
    return {k: told[k] for k in ("model", "fired", "raised", "verification", "notes") if k in told}


# -- files


def save(model: Any, place: Path, *, check: bool, prove: Callable[[Path], None] | None = None) -> Path | None:
    """Write model and weights into a folder beside the place, check them there, then move both; the weights' file if any."""
    import onnx_ir as ir

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise IsADirectoryError(f"{place} is a folder")
        workshop = Path(tempfile.mkdtemp(prefix=f".{place.stem}-", dir=place.parent))
    except OSError as problem:
        raise LoweringError(f"cannot write {place}: {problem.strerror or problem}") from None
    try:
        beside = workshop / place.name
        data = f"{place.name}.data" if _weight_bytes(model) > EMBEDDED else None
        ir.save(model, beside, external_data=data)
        if check:
            _check(beside)
        if prove:
            prove(beside)
        return _move_in(workshop, place, data)
    except OSError as problem:
        raise LoweringError(f"cannot write {place}: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _weight_bytes(model: Any) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise LoweringError(f"the ONNX checker refuses what was written: {_reason(error)}") from error


def _move_in(workshop: Path, place: Path, data: str | None) -> Path | None:
    """The weights first: a model is never without them. If the model cannot follow, the old weights come back."""
    if data is None:
        (workshop / place.name).replace(place)
        return None
    target, old = place.parent / data, workshop / "old.data"
    if target.exists():
        target.replace(old)
    try:
        (workshop / data).replace(target)
        (workshop / place.name).replace(place)
    except OSError:
        target.unlink(missing_ok=True)
        if old.exists():
            old.replace(target)
        raise
    return target


def _report(
    model: Any, place: Path, choice: Choice, decisions: Sequence[str], external: Path | None, seconds: dict[str, float]
) -> OnnxReport:
    counted = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes())
    size = place.stat().st_size + (external.stat().st_size if external else 0)
    return OnnxReport(
        path=place,
        target=choice.target,
        opset=choice.opset,
        operators=dict(counted),
        inputs={v.name: _shape(v) for v in model.graph.inputs},
        outputs={v.name: _shape(v) for v in model.graph.outputs},
        bytes=size,
        external_data=external,
        decisions=tuple(decisions),
        conditions=tuple(json.loads(model.metadata_props.get(CONDITIONS, "[]"))),
        seconds=seconds,
    )


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(s if isinstance(s, int) else str(s.value) for s in value.shape or ())
