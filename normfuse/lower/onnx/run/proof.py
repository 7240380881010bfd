"""Running a file that was just written, on inputs whose results are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from normfuse.graph.program import Program
from normfuse.lower.onnx.run.runtime import first_line, result_places, session_options
from normfuse.lower.onnx.run.session import Session

CPU = "CPUExecutionProvider"


class NotRun(Exception):
    """The file cannot be run here; the message is the reason."""


def run_file(path: Path, program: Program, trials: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Flat outputs of the file for each trial of flat inputs of the program it was written from.

    Raises `NotRun` where onnxruntime is not installed, or lacks an operator or a dtype.
    """
    try:
        import onnxruntime
    except ImportError:
        raise NotRun("onnxruntime is not installed") from None
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=[CPU])
    except Exception as error:
        raise NotRun(f"onnxruntime cannot load it: {first_line(error)}") from None
    run = Session(session)
    names = [name for name, _, _ in run.inputs]
    tensors = [place for place, leaf in enumerate(program.signature.leaves) if leaf.is_tensor]
    places = result_places(program)
    found: list[list[Any]] = []
    for leaves in trials:
        given = [leaves[place] for place in tensors]
        try:
            results = run({name: tensor.cpu() for name, tensor in zip(names, given, strict=True)})
        except Exception as error:
            raise NotRun(f"onnxruntime cannot run it: {first_line(error)}") from None
        device = given[0].device if given else torch.device("cpu")
        found.append([item if at is None else results[at].to(device) for at, item in places])
    return found
