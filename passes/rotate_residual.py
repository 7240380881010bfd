"""rotate_residual:  W_out, norm, W_in  ->  R^T W_out, norm, W_in R     (v, o per head  ->  Q^T v, o Q)

Exactness: algebraic.
Legal if:  every norm on the residual stream is an RMSNorm without gain over its full channel axis (run
           fold_norm_affine, and layer_norm_to_rms_norm for LayerNorms, before), projections alone read the stream or
           those norms, and all its writers have weights. Per head: the values pass attention once, and projections
           alone read the result.
Leaves alone: streams with a LayerNorm, a gain, an element-wise operator or an output of the model on them.
Reference: METHODS 1.13; Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456), section 4; Liu et al. 2024 (SpinQuant,
           arXiv 2405.16406), section 3.1; Xu et al. 2025 (MambaQuant, arXiv 2501.13484), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from normfuse.algebra.calibration import principal_axes
from normfuse.algebra.channels import map_writer, times
from normfuse.algebra.heads import map_value_heads
from normfuse.algebra.online import turn_online
from normfuse.algebra.orthogonal import hadamard_rotation, is_orthogonal, random_orthogonal
from normfuse.analysis import Facts
from normfuse.analysis.heads import value_heads
from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.streams import Reader, Stream, stream_of
from normfuse.analysis.writers import writers
from normfuse.graph.node import argument, aten, is_op, op_name, operand, rank, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.crms_norm import CRMS_NORM
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.ops.traits import Trait, is_a
from normfuse.rewrite import Editor, Exactness, Transform, Value

Make = Callable[[Program, Stream | None, int], Tensor | str]
KINDS = ("hadamard", "random", "klt", "klt_hadamard")


def configured(
    *, kind: str = "hadamard", matrix: Tensor | None = None, seed: int = 0, calibration: Iterable[Any] | None = None,
    stream: bool = True, heads: bool = True, online: bool = False,
) -> Transform:  # fmt: skip
    """The pass with options, for `optimize(passes=[...])` in the place of its name.

    `kind`: a Hadamard matrix with random signs, a random orthogonal matrix, the eigenvectors of the stream's covariance
    over `calibration` (example inputs), or those times a Hadamard matrix. `matrix`: this one instead, for streams.
    `stream`, `heads`: rotate the residual stream (R1), and each attention's value heads (R2; Hadamard or random).
    `online`: at run time, queries and keys (R3) and what a projection reads of a gate or nonlinearity (R4).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind.startswith("klt") and calibration is None:
        raise ValueError(f"kind={kind!r} needs calibration: example inputs of the model")
    if matrix is not None and (matrix.dim() != 2 or not is_orthogonal(matrix)):
        raise ValueError("matrix is not orthogonal")
    examples = tuple(calibration or ())

    def make(program: Program, found: Stream | None, width: int) -> Tensor | str:
        if matrix is not None and found is not None:
            return matrix.double() if len(matrix) == width else f"the matrix is {len(matrix)} wide, the stream {width}"
        spread = random_orthogonal(width, seed) if kind == "random" else hadamard_rotation(width, seed)
        if found is None or not kind.startswith("klt"):
            return f"no Hadamard matrix of size {width} is known here: use kind='random'" if spread is None else spread
        read = {n: axis for n, axis in found.tensors.items() if any(is_op(user, RMS_NORM) for user in n.users)}
        basis = principal_axes(program, read, examples, "rotate_residual: covariance")
        return basis if kind == "klt" or spread is None else basis @ spread

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        if stream:
            _rotate_streams(program, facts, edit, make)
        if heads:
            _rotate_heads(program, facts, edit, make)
        if online:
            turn_online(program, edit, facts(weight_only), lambda width: make(program, None, width))

    return Transform("rotate_residual", exactness=Exactness.ALGEBRAIC, on_request=True, run=run)


def _rotate_streams(program: Program, facts: Facts, edit: Editor, make: Make) -> None:
    done: set[fx.Node] = set()
    plain = frozenset(n for n in program.graph.nodes if is_op(n, RMS_NORM) and _is_plain(n))
    for norm in [n for n in program.graph.nodes if is_a(n, Trait.ROW_NORM) or is_op(n, CRMS_NORM)]:
        if norm in done or norm in facts(weight_only):
            continue
        found = stream_of(operand(norm), rank(norm) - 1, facts(weight_only), plain)
        done.update([*found.tensors, *(reader.node for reader in found.readers)])
        matrix = _blocker(found, facts) or make(program, found, int(found.width))  # type: ignore[call-overload]
        if isinstance(matrix, str):
            edit.refuse(norm, matrix)
        elif edit.permit(norm):
            edit.fired(norm, before=f"stream of width {found.width}", after="rotated stream")
            _rotate(found, edit.constant(matrix, "rotation"), edit, facts)


def _is_plain(norm: fx.Node) -> bool:
    return list(argument(norm, "axes")) == [-1] and argument(norm, "weight") is None and argument(norm, "bias") is None


def _blocker(found: Stream, facts: Facts) -> str | None:
    for reader in found.readers:
        node, where = reader.node, f"{op_name(reader.node)} at {site(reader.node)}"
        if is_op(node, aten.layer_norm):
            return f"the stream is read by {where}: run layer_norm_to_rms_norm before"
        if is_op(node, CRMS_NORM):
            return f"the {where} needs its own basis: use the householder form of rms_norm_to_crms_norm"
        if is_op(node, RMS_NORM):
            return f"the {where} has a gain or other axes: run fold_norm_affine before"
        if node.op == "output":
            return "a tensor of the stream is an output of the model"
        if _projection(reader, facts) is None:
            return f"the stream is also read by {where}, which a rotation does not pass"
    return next((why for writer in found.writers if (why := facts(writers).why_not(writer))), None)


def _projection(reader: Reader, facts: Facts) -> Projection | None:
    found = projection(reader.node, reader.tensor, facts(weight_only))
    return found if found and found.groups == 1 and reader.axis == found.channel_axis % rank(reader.tensor) else None


def _rotate(found: Stream, matrix: Value, edit: Editor, facts: Facts) -> None:
    turn, known = times(matrix), facts(writers)
    readers = [read for reader in found.readers if (read := _projection(reader, facts)) is not None]
    for writer in found.writers:
        map_writer(edit, known, writer, turn)
    for read in readers:
        node = edit.current(read.node)  # a projection may read the stream and write it
        with edit.at(node):
            turned = turn(edit.value(argument(node, read.weight_name)), read.in_axis)
            edit.replace(node, edit.rebuild(node, **{read.weight_name: turned}))


def _rotate_heads(program: Program, facts: Facts, edit: Editor, make: Make) -> None:
    pairs, refused = facts(value_heads)
    for mix, why in refused.items():
        edit.refuse(mix, why)
    for pair in pairs:
        matrix = make(program, None, pair.rows.shape[1])
        if isinstance(matrix, str):
            edit.refuse(pair.mix, matrix)
        elif edit.permit(pair.mix):
            edit.fired(pair.mix, before="value heads", after="rotated value heads")
            left = edit.constant(matrix.T.contiguous(), "head").to(pair.writer.weight.meta["val"].dtype)
            map_value_heads(edit, pair, left, left)


RULE = configured()
