"""migrate_scales:  W f(writer(x))  ->  (W diag(s)) f(writer(x) / s)

Exactness: algebraic.
Legal if:  s > 0, the writer is a norm or a projection, and between it and projections stand only views, attention
           (which mixes tokens), products with other tensors and functions with f(s x) = s f(x): norm gain to its
           projections, v to o (one scale for all copies of a grouped head), up to down of a gated MLP, fc1 to ReLU,
           a depthwise convolution. Queries against keys: one scale for both channels that RoPE turns together.
Leaves alone: channels that pass GELU or any other function, SiLU unless asked for, a sum, or that anything else reads.
Reference: METHODS 1.12; Xiao et al. 2023 (SmoothQuant, arXiv 2211.10438), eq. 4; Lin et al. 2024 (AWQ, arXiv
           2306.00978), eq. 4; Nagel et al. 2019 (arXiv 1906.04721), section 4.1, for scales from weights alone; METHODS 1.13
           for OSTQuant (arXiv 2501.13987) and MambaQuant (arXiv 2501.13484).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.algebra.scales import activation_aware, look, migrate, score_scale, smooth
from normfuse.analysis import Facts
from normfuse.analysis.scaling import Pair, ScorePair, pairs, score_pairs
from normfuse.graph.node import module_path, op_name
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform

METHODS = ("smoothquant", "awq")


def configured(
    *, method: str = "smoothquant", alpha: float = 0.5, bits: int = 4, calibration: Iterable[Any] | None = None,
    scales: Mapping[str, Tensor] | None = None, silu: bool = False,
) -> Transform:  # fmt: skip
    """The pass with options, for `optimize(passes=[...])` in the place of its name.

    `method="smoothquant"`: max|X|**alpha / max|W|**(1 - alpha), with X from `calibration` (example inputs) or, without,
    estimated by the writer's own weights. `method="awq"`: mean|X|**rho, rho from a grid by the loss of rounding weights
    to `bits` bits. `scales`: these instead, by the qualified name of the module (norm or projection) that writes the
    channels; one number for each channel that it writes, or for each that its reader reads. The name of the queries'
    or the keys' projection: what the one is divided by, the other takes. `silu`: through SiLU, too, which gets the scale
    as one product more: z sigmoid(s z) (MambaQuant).
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
        found, refused = pairs(program, silu=silu)
        if scales is not None:
            _give(found, refused, scales, edit, program)
            return
        for node, why in refused.items():
            edit.refuse(node, why)
        seen = look(program, found, examples, "migrate_scales: activations") if examples else {}
        chosen = [activation_aware(program, p, bits, seen) for p in found] if method == "awq" else [None] * len(found)
        for pair, scale in zip(found, chosen, strict=True):
            if edit.permit(pair.writer):
                _tell(edit, pair)
                with edit.at(edit.current(pair.writer)):
                    factor = smooth(edit, pair, alpha, seen) if scale is None else edit.constant(scale, "scale")
                migrate(edit, pair, factor)

    return Transform("migrate_scales", exactness=Exactness.ALGEBRAIC, on_request=True, run=run)


def _tell(edit: Editor, pair: Pair) -> None:
    readers = ", ".join(module_path(end.reader.node) or op_name(end.reader.node) for end in pair.ends)
    edit.fired(edit.current(pair.writer), before=op_name(pair.writer), after=f"{op_name(pair.writer)}, scales in {readers}")


# -- scales of the user's


def _give(
    found: list[Pair], refused: Mapping[fx.Node, str], scales: Mapping[str, Tensor], edit: Editor, program: Program
) -> None:
    scored, unscored = score_pairs(program)
    for name, given in scales.items():
        scale = given.detach().double().cpu()
        pair = next((p for p in found if module_path(p.writer) == name), None)
        score = next((s for s in scored if name in (module_path(s.query.writer), module_path(s.key.writer))), None)
        if pair is not None:
            _give_pair(edit, pair, name, scale)
        elif score is not None:
            _give_scores(edit, score, name, scale)
        else:
            why = [(node, why) for node, why in (*unscored.items(), *refused.items()) if module_path(node) == name]
            edit.refuse(*(why or [(program.output, f"{name} writes no channels that a scale can be moved across")])[0])


def _give_pair(edit: Editor, pair: Pair, name: str, scale: Tensor) -> None:
    fitted = _fitted(pair, name, scale)
    if isinstance(fitted, str):
        edit.refuse(pair.writer, fitted)
        return
    if left := int((fitted[~pair.free] != 1).sum()):
        edit.refuse(pair.writer, f"{left} channels of {name} take no scale: what reads them does not pass it on")
    if edit.permit(pair.writer):
        _tell(edit, pair)
        migrate(edit, pair, edit.constant(fitted, "scale"))


def _give_scores(edit: Editor, score: ScorePair, name: str, scale: Tensor) -> None:
    both = [(score.query, score.queries), (score.key, score.keys)]
    [(writer, own), (other, theirs)] = both if module_path(score.query.writer) == name else both[::-1]
    fitted = score_scale(own, theirs, scale)
    if isinstance(fitted, str):
        edit.refuse(writer.writer, f"{name}: {fitted}")
    elif edit.permit(writer.writer):
        reader = module_path(other.writer)
        edit.fired(edit.current(writer.writer), before="queries, keys", after=f"queries, keys, scales in {name}, {reader}")
        migrate(edit, writer, edit.constant(scale, "scale"))
        migrate(edit, other, edit.constant(fitted, "scale"))


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
    return torch.where(pair.reads(end), copies[0], 1.0)


RULE = configured()
