"""ONNX as a target: every region that ONNX has one operator for becomes a call of that operator."""

from __future__ import annotations

from normfuse.errors import LoweringError
from normfuse.graph.program import Program
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx.rules import TABLE
from normfuse.lower.target import Target


def onnx_target(choice: Choice) -> Target:
    """Forms in the operators that `translations` prints, and aten operators that torch's exporter does."""
    return Target(f"ONNX for {choice.target}", TABLE, choice=choice)


def check_tensors(program: Program) -> None:
    """Weights that were cast or moved after the capture do not fit its graph any more."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            captured, now = node.meta["val"].dtype, program.tensors[str(node.target)].dtype
            if captured != now:
                raise LoweringError(
                    f"the weight {node.target!r} was captured as {captured} and is {now}: optimize it as {now}"
                )
