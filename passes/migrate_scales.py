"""migrate_scales:  W f(writer(x))  ->  (W diag(s)) f(writer(x) / s)

Exactness: algebraic.
Legal if:  s > 0, the writer is a norm or a projection, and between it and projections stand only views, attention
           (which mixes tokens), products with other tensors and functions with f(s x) = s f(x): norm gain to its
           projections, v to o (one scale for all copies of a grouped head), up to down of a gated MLP, fc1 to ReLU.
Leaves alone: channels that pass GELU, SiLU or any other function, RoPE, a sum, or that anything else reads.
Reference: METHODS 1.12; Xiao et al. 2023 (SmoothQuant, arXiv 2211.10438), eq. 4; Lin et al. 2024 (AWQ, arXiv
           2306.00978), eq. 4; Nagel et al. 2019 (arXiv 1906.04721), section 4.1, for scales from weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.analysis import Facts
from normfuse.analysis.constants import weight_only
from normfuse.analysis.projections import projection
from normfuse.analysis.routes import Routes, routes
from normfuse.node import argument, aten, is_op, module_path, op_name, rank, shape, site
from normfuse.ops import RMS_NORM
from normfuse.program import Program
from normfuse.rewrite import Editor, Exactness, Transform
from normfuse.rewrite.scales import Pair, activation_aware, look, migrate, smooth

METHODS = ("smoothquant", "awq")


def configured(
    *, method: str = "smoothquant", alpha: float = 0.5, bits: int = 4, calibration: Iterable[Any] | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Transform:  # fmt: skip
    """The pass with options, for `optimize(passes=[...])` in the place of its name.

    `method="smoothquant"`: max|X|**alpha / max|W|**(1 - alpha), with X from `calibration` (example inputs) or, without,
    estimated by the writer's own weights. `method="awq"`: mean|X|**rho, rho from a grid by the loss of rounding weights
    to `bits` bits. `scales`: these instead, by the qualified name of the module (norm or projection) that writes the
    channels; one number for each channel that it writes, or for each that its reader reads.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method == "awq" and calibration is None and scales is None:
        raise ValueError("method='awq' needs calibration: example inputs of the model")
    for name, scale in (scales or {}).items():
        if scale.dim() != 1 or not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise ValueError(f"the scales of {name!r} must be a vector of positive numbers")
    examples = tuple(calibration or ())

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        pairs = _pairs(program, facts, edit, frozenset(scales or ()))
        if scales is not None:
            _give(pairs, scales, edit, program)
            return
        seen = look(program, pairs, examples, "migrate_scales: activations") if examples else {}
        chosen = [activation_aware(program, p, bits, seen) for p in pairs] if method == "awq" else [None] * len(pairs)
        for pair, scale in zip(pairs, chosen, strict=True):
            if edit.permit(pair.writer):
                _tell(edit, pair)
                with edit.at(edit.current(pair.writer)):
                    found = smooth(edit, pair, alpha, seen) if scale is None else edit.constant(scale, "scale")
                migrate(edit, pair, found)
        facts.drop()

    return Transform("migrate_scales", exactness=Exactness.ALGEBRAIC, on_request=True, run=run)


def _tell(edit: Editor, pair: Pair) -> None:
    readers = ", ".join(module_path(end.reader.node) or op_name(end.reader.node) for end in pair.ends)
    edit.fired(edit.current(pair.writer), before=op_name(pair.writer), after=f"{op_name(pair.writer)}, scales in {readers}")


def _pairs(program: Program, facts: Facts, edit: Editor, asked: frozenset[str]) -> list[Pair]:
    found: list[Pair] = []
    for node in list(program.graph.nodes):
        writer = projection(node, None, facts(weight_only))
        norm = is_op(node, aten.layer_norm, RMS_NORM) and _is_over_last(node)
        if ((writer is None or writer.groups != 1) and not norm) or node in facts(weight_only):
            continue
        pair = _pair(node, facts(routes))
        if isinstance(pair, Pair):
            found.append(pair)
        elif pair and (not asked or module_path(node) in asked):
            edit.refuse(node, pair)
    return found


def _is_over_last(node: fx.Node) -> bool:
    return len(argument(node, "axes" if is_op(node, RMS_NORM) else "normalized_shape")) == 1


def _pair(node: fx.Node, known: Routes) -> Pair | str:
    writer = projection(node, None, known.weights)
    axis = rank(node) - 1 if writer is None else writer.channel_axis % rank(node)
    route = known.route(node, axis, scales=True)
    free = torch.ones(int(shape(node)[axis]), dtype=torch.bool)
    for _, used in route.blocked:
        free[used] = False
    read = torch.cat([end.labels for end in route.ends]) if route.ends else torch.empty(0, dtype=torch.long)
    free &= torch.isin(torch.arange(len(free)), read)
    if bool(free.any()):
        ends = tuple(end for end in route.ends if bool(free[end.labels.clamp(min=0)][end.labels >= 0].any()))
        return Pair(node, writer, free, ends)
    blocker = next(iter(route.blocked), None)
    return f"{op_name(blocker[0])} at {site(blocker[0])} does not pass scales of its input on" if blocker else ""


# -- scales of the user's


def _give(pairs: list[Pair], scales: Mapping[str, Tensor], edit: Editor, program: Program) -> None:
    for name, scale in scales.items():
        pair = next((p for p in pairs if module_path(p.writer) == name), None)
        if pair is None:
            edit.refuse(program.output, f"{name} writes no channels that a scale can be moved across")
            continue
        fitted = _fitted(pair, name, scale.detach().double().cpu())
        if isinstance(fitted, str):
            edit.refuse(pair.writer, fitted)
        elif edit.permit(pair.writer):
            _tell(edit, pair)
            migrate(edit, pair, edit.constant(fitted, "scale"))


def _fitted(pair: Pair, name: str, scale: Tensor) -> Tensor | str:
    """The scale by the writer's channels."""
    if len(scale) == len(pair.free):
        return scale
    end = next((e for e in pair.ends if len(e.labels) == len(scale)), None)
    if end is None:
        return f"{name} writes {len(pair.free)} channels, and {len(scale)} scales were given"
    copies = scale[pair.copies(end)]
    if not bool((copies == copies[:1]).all()):
        return f"the channels of {name} are read several times (grouped heads), and the scales of the copies differ"
    return copies[0]


RULE = configured()
