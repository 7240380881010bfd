"""Why a size of an input is fixed in a captured program: in words, with the line that fixed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from normfuse.capture.branches import is_of_the_model, place_of
from normfuse.graph.node import aten, is_op, readers, source_line, value
from normfuse.graph.program import Program


def fixed_sizes(
    program: Program, exported: ExportedProgram, reason: str, earlier: Mapping[str, str]
) -> dict[str, str]:
    """`x.shape[1]` -> why it is what it is, for every size of an input that may not vary.

    `reason`: why sizes that the exporter was not asked to let vary are fixed; `earlier`: why they were when it was asked.
    """
    guards = _guards(exported)
    found: dict[str, str] = {}
    for node, leaf in zip(program.placeholders, program.signature.leaves, strict=True):
        val = value(node)
        for axis, size in enumerate(leaf.sizes):
            if isinstance(size, int) and isinstance(val, Tensor):
                symbol = _symbol(val.shape[axis])
                where = f"{leaf.name}.shape[{axis}]"
                unasked = earlier.get(where) or _unasked(size, reason)
                found[where] = _why(symbol, guards, node) if symbol is not None else unasked
    return found


def notes_of(fixed: Mapping[str, str], sizes: Mapping[str, int]) -> Iterator[str]:
    """One sentence for each reason: `x.shape[2] = 224, x.shape[3] = 224 do not vary: ...`."""
    by_reason: dict[str, list[str]] = {}
    for where, why in fixed.items():
        by_reason.setdefault(why, []).append(f"{where} = {sizes[where]}")
    for why, places in by_reason.items():
        yield f"{', '.join(places)} {'does' if len(places) == 1 else 'do'} not vary: {why}"


def _unasked(size: int, reason: str) -> str:
    if size == 1 and not reason:
        return "the example has one entry there; an example with more lets it vary"
    return reason or "the exporter fixed it"


def _symbol(size: Any) -> str | None:
    """The symbol that the exporter first gave to a size which it then found to be fixed."""
    expression = getattr(getattr(size, "node", None), "_expr", None)
    return str(expression) if expression is not None and not expression.is_number else None


def _guards(exported: ExportedProgram) -> list[Any]:
    modes = (getattr(n.meta.get("val"), "fake_mode", None) for n in exported.graph.nodes)
    mode = next((m for m in modes if m is not None), None)
    return list(getattr(getattr(mode, "shape_env", None), "guards", ()))


def _why(symbol: str, guards: list[Any], node: Any) -> str:
    named = [guard for guard in guards if symbol in {str(s) for s in guard.expr.free_symbols}]
    asked = next((g for g in reversed(named) if type(g.expr).__name__ == "Equality"), named[-1] if named else None)
    if asked is not None and is_of_the_model(asked):
        return f"the model's code asks for its number ({place_of(asked)})"
    reader = next(iter(readers(node)), None)
    where = f" ({line})" if reader is not None and (line := source_line(reader)) else ""
    if reader is not None and is_op(reader, aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu):
        return f"the exporter unrolls a recurrent layer over it{where}"
    return f"a weight or a constant of the model has that size{where}"
