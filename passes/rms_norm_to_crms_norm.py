"""rms_norm_to_crms_norm:  W_out, rms_norm, W_in  ->  W_out without its last row, crms_norm, W_in U     (d-1 channels)

Exactness: algebraic.
Legal if:  the stream has zero mean (run layer_norm_to_rms_norm before), its norms are RMSNorms without gain over the full
           channel axis (fold_norm_affine), projections alone read them, and all writers have weights.
Leaves alone: RMSNorm models, whose stream has a mean; streams that anything else reads. Two forms: drop the last channel,
           which the others tell (U = [I; -1]), or an orthonormal basis of what is orthogonal to the ones (Householder),
           where the norm is an RMSNorm of d-1 numbers divided by d, and rotations still apply.
Reference: METHODS 1.3; Jiang et al. 2023 (arXiv 2305.14858), section 4.2; Ashkboos et al. 2024 (arXiv 2401.15024).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from normfuse.algebra.channels import map_writer, narrow, times
from normfuse.algebra.orthogonal import complement_of_ones
from normfuse.analysis import Facts
from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.streams import Reader, Stream, stream_of
from normfuse.analysis.writers import writers
from normfuse.analysis.zero_mean import zero_mean
from normfuse.graph.node import argument, is_op, op_name, operand, rank, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.rewrite import Editor, Exactness, Transform, Value

FORMS = ("drop_last", "householder")


@dataclass
class Plan:
    """What to do in graph order: tensors that get narrower, norms, and projections (with: behind a norm?)."""

    stream: Stream
    tensors: dict[fx.Node, int]
    norms: list[fx.Node]
    readers: dict[fx.Node, tuple[Projection, bool]]


def configured(*, form: str = "drop_last") -> Transform:
    """The pass with options, for `optimize(passes=[...])` in the place of its name: `form` as told above."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        done: set[fx.Node] = set()
        for norm in [n for n in program.graph.nodes if is_op(n, RMS_NORM)]:
            if norm in done or norm._erased or norm in facts(weight_only):
                continue
            stream = stream_of(operand(norm), rank(norm) - 1, facts(weight_only))
            mine = [r.node for r in stream.readers if is_op(r.node, RMS_NORM)]
            done.update(mine)
            plan = _plan(stream, mine, facts)
            reason = plan if isinstance(plan, str) else None if edit.named else _not_worth(norm)
            if reason:
                edit.refuse(norm, reason)
            elif isinstance(plan, Plan) and edit.permit(norm):
                for each in mine:
                    edit.fired(each, before="rms_norm", after="crms_norm" if form == "drop_last" else "rms_norm of d-1")
                _compress(program, plan, form, edit, facts)

    return Transform("rms_norm_to_crms_norm", exactness=Exactness.ALGEBRAIC, on_request=True, run=run)


def _not_worth(norm: fx.Node) -> str:
    width = int(shape(norm)[-1])
    row = (width - 1) * norm.meta["val"].element_size()
    return (
        f"it saves 1 of {width} channels ({100 / width:.2f} %), and rows of {width - 1} channels are {row} bytes, no "
        f"multiple of 16: loads get narrower, and tiles of 64 are {-(-(width - 1) // 64)} instead of {-(-width // 64)}"
    )


def _plan(stream: Stream, norms: list[fx.Node], facts: Facts) -> Plan | str:
    if not isinstance(stream.width, int):
        return "the width of the stream is free"
    if not all(facts(zero_mean)(writer.node, writer.axis) for writer in stream.writers):
        return "the stream has a mean: run layer_norm_to_rms_norm before (RMSNorm models keep theirs)"
    plan = Plan(stream, dict(stream.tensors), norms, {})
    for norm in norms:
        if list(argument(norm, "axes")) != [-1] or any(argument(norm, n) is not None for n in ("weight", "bias")):
            return f"the norm at {site(norm)} has a gain or other axes: run fold_norm_affine before"
        behind = stream_of(norm, rank(norm) - 1, facts(weight_only))
        if [w.node for w in behind.writers] != [norm]:
            return f"the norm at {site(norm)} also writes a stream"
        plan.tensors |= behind.tensors
        if (why := _add_readers(plan, behind.readers, True, facts)) is not None:
            return why
    others = [reader for reader in stream.readers if reader.node not in norms]
    reasons = (facts(writers).why_not(writer) for writer in stream.writers)
    return _add_readers(plan, others, False, facts) or next((why for why in reasons if why), None) or plan


def _add_readers(plan: Plan, readers: list[Reader], behind_norm: bool, facts: Facts) -> str | None:
    for reader in readers:
        found = projection(reader.node, reader.tensor, facts(weight_only))
        if found is None or found.groups != 1 or reader.axis != found.channel_axis % rank(reader.tensor):
            return f"the stream is also read by {op_name(reader.node)} at {site(reader.node)}"
        plan.readers[reader.node] = (found, behind_norm)
    return None


# -- doing it


def _compress(program: Program, plan: Plan, form: str, edit: Editor, facts: Facts) -> None:
    width = int(shape(plan.norms[0])[-1])
    basis = edit.constant(complement_of_ones(width), "basis") if form == "householder" else None

    def into(weight: Value, axis: int) -> Value:
        """Coordinates of what is written."""
        if basis is None:
            return edit.op("slice", weight, axis, 0, width - 1)
        return times(basis)(weight, axis)

    def out_of(weight: Value, axis: int) -> Value:
        """Weights for what is read: a slice for each coordinate, less the last channel that they tell."""
        if basis is not None:
            return into(weight, axis)
        return into(weight, axis) - edit.op("slice", weight, axis, width - 1, width)

    known = facts(writers)
    for writer in plan.stream.writers:
        map_writer(edit, known, writer, into)
    readers = {edit.current(node): found for node, found in plan.readers.items()}  # some write the stream, too
    ratio = width / (width - 1)
    for node in list(program.graph.nodes):
        if node in readers:
            found, behind_norm = readers[node]
            weight = out_of(edit.value(argument(node, found.weight_name)), found.in_axis)
            with edit.at(node):
                scaled = weight * ratio**0.5 if behind_norm and basis is not None else weight
                edit.replace(node, edit.rebuild(node, **{found.weight_name: scaled}))
        elif node in plan.norms:
            eps = float(argument(node, "eps"))
            with edit.at(node):
                name, scaled_eps = ("crms_norm", eps) if basis is None else ("rms_norm", eps * ratio)
                edit.replace(node, edit.op(name, node.args[0], [-1], None, None, eps=scaled_eps))
        elif node in plan.tensors:
            narrow(edit, node, plan.tensors[node], width, width - 1)


RULE = configured()
