"""Inventory: the norms, softmaxes and attentions of a model, counted once each however they are spelt."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from normfuse.analysis.constants import weight_only
from normfuse.analysis.streams import ends_of
from normfuse.node import argument, arguments, aten, is_op, rank, readers, shape, site
from normfuse.ops import CRMS_NORM, DERF, DYT, L2_NORM, RMS_NORM, SOFTMAX_OVER, STANDARDIZE
from normfuse.program import Program
from normfuse.raise_.weights import weight_patterns

KINDS = (
    "layer_norm", "rms_norm", "crms_norm", "l2_norm", "batch_norm", "group_norm", "instance_norm", "softmax", "attention",
    "weight_norm", "spectral_norm", "weight_standardization", "rep_batch_norm", "unified_norm", "power_norm", "dyt", "derf",
    "branches", "lora",
)  # fmt: skip

_OPERATORS = {
    "layer_norm": (aten.layer_norm,),
    "rms_norm": (RMS_NORM, aten.rms_norm),
    "crms_norm": (CRMS_NORM,),
    "l2_norm": (L2_NORM,),
    "dyt": (DYT,),
    "derf": (DERF,),
    "batch_norm": (aten.batch_norm,),
    "group_norm": (aten.group_norm,),
    "instance_norm": (aten.instance_norm,),
    "softmax": (aten.softmax, aten._softmax, aten.log_softmax, SOFTMAX_OVER),
    "attention": (aten.scaled_dot_product_attention,),
}  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """One norm, softmax or attention: what, where, over which axes, with which eps, with which gains, and its role."""

    kind: str
    site: str
    axes: tuple[int, ...] = ()
    eps: float | None = None
    affine: str = "none"
    placement: str = "other"


@dataclass
class Inventory:
    """All patterns in graph order. `count(kind)`, a table by `str()`, plain data by `to_dict()`."""

    model: str = ""
    patterns: list[Pattern] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def count(self, kind: str) -> int:
        """How many patterns of a kind there are. Raises `ValueError` for a kind that does not exist."""
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}: the kinds are {', '.join(KINDS)}")
        return sum(1 for p in self.patterns if p.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "counts": dict(self.counts()), "patterns": [asdict(p) for p in self.patterns]}

    def counts(self) -> Counter[str]:
        return Counter(p.kind for p in self.patterns)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, legacy_windows=False)
        console.print(self.renderable())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def renderable(self) -> Any:
        """A rich table: like patterns in one row."""
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False, title=self.model, title_justify="left")
        for title in ("kind", "count", "placement", "axes", "eps", "affine", "first at"):
            table.add_column(title, justify="right" if title == "count" else "left", overflow="fold")
        groups: dict[tuple[Any, ...], list[Pattern]] = {}
        for p in self.patterns:
            groups.setdefault((p.kind, p.placement, p.axes, p.eps, p.affine), []).append(p)
        for (kind, placement, axes, eps, affine), found in groups.items():
            shown = "" if eps is None else f"{eps:g}"
            table.add_row(kind, str(len(found)), placement, ", ".join(map(str, axes)), shown, affine, found[0].site)
        if not groups:
            table.add_row("nothing", "0", "", "", "", "", "")
        return table


def take_inventory(program: Program, model: str = "") -> Inventory:
    """The inventory of a raised program."""
    return Inventory(model, list(_patterns(program)), program.notes)


def _patterns(program: Program) -> Iterator[Pattern]:
    weights = weight_only(program)
    for node in program.graph.nodes:
        kind = _kind(node, weights)
        if kind is not None and node not in weights:
            yield _pattern(kind, node, program, weights)
    for found in weight_patterns(program):
        yield Pattern(found.kind, site(found.node), found.axes, found.eps, found.affine, "other")


def _kind(node: fx.Node, weights: frozenset[fx.Node]) -> str | None:
    if is_op(node, STANDARDIZE):
        return "layer_norm" if argument(node, "centre") else "rms_norm"
    if is_op(node, aten.batch_norm) and (argument(node, "training") or argument(node, "running_mean") not in weights):
        return None
    return next((kind for kind, packets in _OPERATORS.items() if is_op(node, *packets)), None)


def _pattern(kind: str, node: fx.Node, program: Program, weights: frozenset[fx.Node]) -> Pattern:
    axes, eps = _axes_and_eps(kind, node)
    placement = "other" if kind in ("softmax", "attention", "weight_norm") else placement_of(node, program)
    return Pattern(kind, site(node), axes, eps, _affine(kind, node, weights), placement)


def _axes_and_eps(kind: str, node: fx.Node) -> tuple[tuple[int, ...], float | None]:
    if is_op(node, aten.layer_norm, aten.rms_norm):
        return tuple(range(-len(argument(node, "normalized_shape")), 0)), argument(node, "eps")
    if is_op(node, RMS_NORM, STANDARDIZE, CRMS_NORM, L2_NORM):
        return tuple(argument(node, "axes")), argument(node, "eps")
    if is_op(node, SOFTMAX_OVER):
        return tuple(argument(node, "axes")), None
    if kind == "softmax":
        return (_negative(int(argument(node, "dim")), node),), None
    if kind in ("batch_norm", "instance_norm", "group_norm"):
        first = {"batch_norm": (0, *range(2, rank(node))), "group_norm": tuple(range(1, rank(node)))}
        if kind == "group_norm" and argument(node, "num_groups") == shape(node)[1]:
            first = {}
        axes = first.get(kind, tuple(range(2, rank(node))))
        return tuple(_negative(a, node) for a in axes), argument(node, "eps")
    return (), None


def _negative(axis: int, node: fx.Node) -> int:
    return axis - rank(node) if axis >= 0 else axis


def _affine(kind: str, node: fx.Node, weights: frozenset[fx.Node]) -> str:
    """Gain and shift of the model: the operator's own, or those that follow it."""
    if kind in ("softmax", "attention", "weight_norm"):
        return ""
    own = {name for name in ("weight", "bias") if arguments(node).get(name) in weights}
    has = own | _following(node, weights) if kind not in ("dyt", "derf") else own
    return " and ".join(name for name in ("weight", "bias") if name in has) or "none"


_LOOKS = (aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.to, aten._to_copy, aten.type_as, aten.permute,
          aten.transpose, aten.movedim, aten.contiguous, aten.squeeze, aten.unsqueeze)  # fmt: skip


def _following(node: fx.Node, weights: frozenset[fx.Node]) -> set[str]:
    """A gain and a shift by weights right behind the norm, that nothing else stands between."""
    found: set[str] = set()
    while len(users := readers(node)) == 1:
        user = users[0]
        by_weight = any(n in weights for n in user.all_input_nodes)
        if is_op(user, aten.mul) and by_weight and not found:
            found.add("weight")
        elif is_op(user, aten.add) and by_weight and "bias" not in found:
            found.add("bias")
        elif not is_op(user, *_LOOKS) and not (is_op(user, aten.mul, aten.div) and len(user.all_input_nodes) == 1):
            break
        node = user
    return found


# -- placement ----------------------------------------------------------------------------------------------------

_PROJECTIONS = (aten.linear, aten.addmm, aten.mm, aten.matmul, aten.conv1d, aten.conv2d, aten.conv3d)


def placement_of(node: fx.Node, program: Program) -> str:
    """The role of a norm, told from what it reads and what reads it.

    pre: reads a residual sum (or embedding) that goes on past it, feeds projections; post: reads a residual sum that
    ends in it; sandwich: normalises a branch before it is added; qk: feeds attention scores; final: the last norm before
    head or output; embedding: normalises embeddings that nothing else reads.
    """
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return "other"
    ends = [end.node for end in ends_of(node, rank(node) - 1)] if rank(node) else []
    into_sum = [n for n in ends if is_op(n, aten.add)]
    others = [n for n in readers(source) if n is not node]
    if _feeds_scores(node):
        return "qk"
    if _is_embedding(source):
        return "pre" if others else "embedding"
    if others and any(is_op(n, aten.add) or _is_norm(n) for n in others):
        return "pre"
    if is_op(source, aten.add) and len(readers(source)) == 1:
        if _is_last_norm(node, program) and not into_sum:
            return "final"
        return "post" if into_sum or ends else "other"
    if into_sum and len(ends) == 1:
        return "sandwich"
    if _is_last_norm(node, program):
        return "final"
    return "other"


def _is_norm(node: fx.Node) -> bool:
    return is_op(node, aten.layer_norm, RMS_NORM, aten.rms_norm, aten.batch_norm, aten.group_norm)


def _is_last_norm(node: fx.Node, program: Program) -> bool:
    """No norm depends on this one."""
    reached: set[fx.Node] = {node}
    for other in program.graph.nodes:
        if other not in reached and any(n in reached for n in other.all_input_nodes):
            if _is_norm(other):
                return False
            reached.add(other)
    return True


def _is_embedding(source: fx.Node) -> bool:
    """An embedding, or a sum of such: everything it adds up is looked up or a parameter."""
    pending, looked_up = [source], False
    for _ in range(16):
        if not pending:
            return looked_up
        current = pending.pop()
        if is_op(current, aten.embedding):
            looked_up = True
        elif is_op(current, aten.add, aten.expand, aten.slice, aten.unsqueeze, aten.view, aten.dropout, aten.mul):
            pending.extend(current.all_input_nodes)
        elif current.op != "get_attr":
            return False
    return False


def _feeds_scores(node: fx.Node) -> bool:
    """Does the norm end, through views and rotations, in queries or keys of an attention?"""
    pending, seen = [node], {node}
    for _ in range(200):
        if not pending:
            return False
        current = pending.pop()
        for user in readers(current):
            if is_op(user, aten.scaled_dot_product_attention):
                return current in user.args[:2]
            passing = (
                aten.transpose, aten.permute, aten.view, aten.reshape, aten.slice, aten.mul, aten.add, aten.cat, aten.neg,
                aten.expand, aten.unsqueeze, aten.contiguous, aten.clone, aten.to, aten.chunk, aten.split, aten.select,
            )  # fmt: skip
            # A residual add is never fed by a rotation of its own operand; a rotary sum is.
            is_rotary_add = not is_op(user, aten.add) or any(is_op(n, aten.mul) for n in user.all_input_nodes)
            if is_op(user, *passing) and is_rotary_add and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


__all__ = ["KINDS", "Inventory", "Pattern", "placement_of", "take_inventory"]
