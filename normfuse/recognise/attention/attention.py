"""raise_attention: softmax(q k' * scale + mask) v, however products, heads and masks are written -> attention

Exactness: algebraic.
Legal if:  the softmax runs over the axis that the second product sums over; between the products stand only scales,
           biases, masks, views and casts; nothing else reads the probabilities.
Leaves alone: capped scores, softmax over the queries, scaled or masked probabilities, sinks, dropout that is on, and
           probabilities that are a result too.
Reference: METHODS 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from normfuse.analysis import Facts
from normfuse.evaluate.sizes import Concrete
from normfuse.graph.node import argument, aten, is_op, op_name, operand, positive_axis, rank, readers, shape, value
from normfuse.graph.program import Program
from normfuse.graph.roles import Role, Roles
from normfuse.recognise.attention.arrange import arranged
from normfuse.recognise.attention.labels import Atoms, Labels, Product, ahead, behind, is_look, product_of
from normfuse.recognise.attention.masks import mask_of
from normfuse.recognise.attention.scores import Reader, Scores
from normfuse.rewrite import Editor, Exactness, Phase, Transform, Value


@dataclass
class Attention:
    """Queries, keys and values with their labels, and the axes of the attention as groups of atoms."""

    atoms: Atoms
    scores: Scores
    root: fx.Node
    out: Labels
    q: fx.Node
    q_labels: Labels
    k: fx.Node
    k_labels: Labels
    v: fx.Node
    v_labels: Labels
    batch: list[tuple[int, ...]] = field(default_factory=list)
    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    depth: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()  # heads of the queries that read the same keys


def run(program: Program, facts: Facts, edit: Editor) -> None:
    roles = Roles(program)
    concretes = (Concrete(program, roles), Concrete(program, roles, small=False))
    for node in list(program.graph.nodes):
        if node._erased or not is_op(node, aten.softmax, aten._softmax) or roles(node) is not Role.ACTIVATION:
            continue
        found = _read(node, roles, concretes)
        if isinstance(found, str):
            edit.refuse(node, found)
        elif edit.permit(found.root):
            _replace(found, roles, concretes, edit)


# -- reading ------------------------------------------------------------------------------------------------------


def _read(node: fx.Node, roles: Roles, concretes: Sequence[Concrete]) -> Attention | str:
    atoms = Atoms()
    labels = atoms.of(node)
    keys = labels[positive_axis(argument(node, "dim"), rank(node))]
    if not keys:
        return "the softmax runs over one entry"
    end = _sum_over(node, labels, atoms)
    if isinstance(end, str):
        return end
    product, v, v_labels, out, contracted = end
    scores = Reader(roles, concretes, atoms).read(operand(node), labels, keys)
    if isinstance(scores, str):
        return scores
    keys = atoms.leaves(keys)
    if set(atoms.leaves(contracted)) != set(keys):
        return "the probabilities are summed over another axis than that of the softmax"
    operands = _queries_and_keys(scores, atoms)
    found = Attention(atoms, scores, product.node, atoms.settled(out), *operands, v, atoms.settled(v_labels))
    return _with_roles(found, labels, keys)


def _sum_over(
    node: fx.Node, labels: Labels, atoms: Atoms
) -> tuple[Product, fx.Node, Labels, Labels, tuple[int, ...]] | str:
    """Forward from the softmax to the product with the values."""
    for _ in range(16):
        users = readers(node)
        if len(users) != 1:
            return "the probabilities are also read elsewhere" if users else "nothing reads the probabilities"
        user = users[0]
        product = product_of(user)
        if product is None and is_op(user, aten.mul) and len(readers(user)) == 1:
            product = product_of(readers(user)[0])
        if product is not None and (product.a is node) != (product.b is node):
            return _with_values(product, product.a is node, labels, atoms)
        following = ahead(user, labels, atoms)
        if following is None:
            return f"{op_name(user)} reads the probabilities"
        node, labels = user, following
    return "the values are too far away"


def _with_values(
    product: Product, is_first: bool, labels: Labels, atoms: Atoms
) -> tuple[Product, fx.Node, Labels, Labels, tuple[int, ...]] | str:
    mine, theirs = (product.letters_a, product.letters_b) if is_first else (product.letters_b, product.letters_a)
    v = product.b if is_first else product.a
    if product.added is not None or product.scale != 1.0:
        return "something is added to the result of the attention"
    known = {letter: axis for letter, axis in zip(mine, labels, strict=True) if letter is not None}
    v_labels: Labels = []
    for letter, size in zip(theirs, shape(v), strict=True):
        if letter is not None and letter not in known:
            known[letter] = atoms.fresh(size)
        v_labels.append(known[letter] if letter is not None else ())
    out = [known[letter] if letter is not None else () for letter in product.letters_out]
    summed = [a for letter, axis in known.items() if letter not in product.letters_out for a in axis]
    return product, v, v_labels, out, tuple(summed)


def _queries_and_keys(scores: Scores, atoms: Atoms) -> tuple[fx.Node, Labels, fx.Node, Labels]:
    product = scores.product
    known = {letter: axis for letter, axis in zip(product.letters_out, scores.labels, strict=True) if letter is not None}
    sides: list[Labels] = []
    for node, letters in ((product.a, product.letters_a), (product.b, product.letters_b)):
        labels: Labels = []
        for letter, size in zip(letters, shape(node), strict=True):
            if letter is not None and letter not in known:
                known[letter] = atoms.fresh(size)
            labels.append(known[letter] if letter is not None else ())
        sides.append(labels)
    return product.a, sides[0], product.b, sides[1]


def _with_roles(found: Attention, labels: Labels, keys: tuple[int, ...]) -> Attention | str:
    """Which operand is which, and what each atom is: batch, query, key, depth or width."""
    atoms = found.atoms
    if set(keys) & _all(found.q_labels, atoms):
        found.q, found.q_labels, found.k, found.k_labels = found.k, found.k_labels, found.q, found.q_labels
    _look_behind(found)
    keys = atoms.leaves(keys)
    q, k, v = (_all(x, atoms) for x in (found.q_labels, found.k_labels, found.v_labels))
    if set(keys) & q or not set(keys) <= k or not set(keys) <= v:
        return "queries, keys and values do not share their axes as in an attention"
    scores = _all(labels, atoms)
    if (q & k) - scores != (q | k) - scores:
        return "the scores are no plain product"
    for _, own, _ in found.scores.factors:
        if set(keys) & _all(own, atoms) and (_all(own, atoms) - set(keys)) & (scores - k):
            return "the scores are scaled by a factor of their own each"
    found.keys = keys
    found.depth = tuple(a for axis in atoms.settled(found.q_labels) for a in axis if a in k and a not in scores)
    found.width = tuple(a for axis in atoms.settled(found.out) for a in axis if a not in scores)
    if not found.depth or not found.width:
        return "there is nothing to multiply"
    order = [a for axis in atoms.settled(labels) for a in axis if a not in keys]
    alone = [a for a in order if a not in k and a not in v]
    if [a for a in order if a not in q]:
        return "the keys have an axis that the queries do not have"
    _divide(found, labels, order, alone)
    return found


def _divide(found: Attention, labels: Labels, order: list[int], alone: list[int]) -> None:
    """Axes of the queries alone are query positions; heads that share their keys are told apart from them if they can."""
    atoms = found.atoms
    axes = [tuple(a for a in axis if a not in found.keys) for axis in atoms.settled(labels)]
    found.queries = tuple(alone)
    found.batch = [rest for axis in axes if (rest := tuple(a for a in axis if a not in alone))]
    parted = [i for i, axis in enumerate(axes) if set(axis) & set(alone)]
    if len(parted) < 2:
        return
    # (..., group, heads of the group, position): attention with grouped heads
    last = axes[parted[-1]]
    shared = tuple(a for i in parted[:-1] for a in axes[i] if a in alone)
    before = [a for a in order if a not in last]
    if set(last) <= set(alone) and found.batch and tuple(before[-len(shared) :]) == shared and len(before) > len(shared):
        head = before[-len(shared) - 1]
        if found.batch[-1] and found.batch[-1][-1] == head:
            found.queries, found.shared = last, shared
            if len(found.batch) == 1:
                found.batch.append(())  # one head of keys for all


def _all(labels: Labels, atoms: Atoms) -> set[int]:
    return {a for axis in atoms.settled(labels) for a in axis}


def _look_behind(found: Attention) -> None:
    """Numbers that scale queries or keys go into the scale; keys and values that were repeated are read unrepeated."""
    found.q, found.q_labels = _unscaled(found, found.q, found.q_labels)
    found.k, found.k_labels = _unscaled(found, found.k, found.k_labels)
    k, v = (_unrepeated(n, labels, found.atoms) for n, labels in ((found.k, found.k_labels), (found.v, found.v_labels)))
    if k is not None and v is not None and _all(k[1], found.atoms) & _all(v[1], found.atoms):
        (found.k, found.k_labels), (found.v, found.v_labels) = k, v


def _unscaled(found: Attention, node: fx.Node, labels: Labels) -> tuple[fx.Node, Labels]:
    start = best = (node, labels)
    for _ in range(8):
        node, labels = start
        step = behind(node, labels, found.atoms)
        if step is not None:
            start = step
            continue
        scaled = _literal(node)
        if scaled is None:
            break
        start = best = scaled[0], labels
        found.scores.scale *= scaled[1]
    return best


def _literal(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x * number and x / number"""
    if not is_op(node, aten.mul, aten.div) or len(node.args) != 2:
        return None
    x, other = node.args
    if not isinstance(x, fx.Node) or isinstance(other, bool) or not isinstance(other, int | float) or other == 0:
        return None
    return x, 1 / float(other) if is_op(node, aten.div) else float(other)


def _unrepeated(node: fx.Node, labels: Labels, atoms: Atoms) -> tuple[fx.Node, Labels] | None:
    """Through the views in front of an expansion of heads, and through it."""
    for _ in range(8):
        if is_op(node, aten.repeat_interleave) and isinstance(node.args[1], int):
            return _uninterleaved(node, labels, atoms)
        expands = is_op(node, aten.expand)
        step = behind(node, labels, atoms) if is_look(node) else None
        if step is None:
            return None
        before = _all(labels, atoms)
        node, labels = step
        if expands and _all(labels, atoms) != before:
            return node, labels
    return None


def _uninterleaved(node: fx.Node, labels: Labels, atoms: Atoms) -> tuple[fx.Node, Labels] | None:
    source, times = node.args[:2]
    axis = argument(node, "dim")
    if axis is None or not isinstance(source, fx.Node):
        return None
    axis = positive_axis(axis, rank(node))
    sizes = [*shape(source)[: axis + 1], times, *shape(source)[axis + 1 :]]
    parted = atoms.reshaped(labels, shape(node), sizes)
    return None if parted is None else (source, [*parted[: axis + 1], *parted[axis + 2 :]])


# -- writing ------------------------------------------------------------------------------------------------------


def _replace(found: Attention, roles: Roles, concretes: Sequence[Concrete], edit: Editor) -> None:
    root = found.root
    with edit.at(root):
        new = _written(found, roles, concretes, edit)
    if new is None:
        edit.refuse(root, "its axes cannot be brought into the order of the operator")
        return
    edit.fired(root, before="attention written out", after="scaled_dot_product_attention")
    edit.replace(root, new)


def _written(found: Attention, roles: Roles, concretes: Sequence[Concrete], edit: Editor) -> Value | None:
    batch = found.batch
    heads = [*batch[:-1], batch[-1] + found.shared] if found.shared else batch
    q = _operand(found.q, found.q_labels, [*heads, found.queries, found.depth], found, edit)
    k = _operand(found.k, found.k_labels, [*batch, found.keys, found.depth], found, edit)
    v = _operand(found.v, found.v_labels, [*batch, found.keys, found.width], found, edit)
    if q is None or k is None or v is None:
        return None
    for factor, labels, divides in found.scores.factors:
        if rank(factor) == 0:
            q = q / factor if divides else q * factor
            continue
        axes = {a for axis in found.atoms.settled(labels) for a in axis}
        groups = [*batch, found.keys, ()] if axes & set(found.keys) else [*heads, found.queries, ()]
        by = arranged(factor, labels, groups, found.atoms, edit)
        if by is None:
            return None
        by = by.to(value(q.node).dtype)
        if axes & set(found.keys):
            k = k / by if divides else k * by
        else:
            q = q / by if divides else q * by
    axes = [*heads, found.queries, found.keys]
    mask, causal = mask_of(found.scores.biases, axes, found.atoms, q, k, roles, concretes, edit)
    if mask is not None and isinstance(mask, str):
        return None
    return _call(found, q, k, v, mask, causal, heads, edit)


def _operand(
    node: fx.Node, labels: Labels, groups: list[tuple[int, ...]], found: Attention, edit: Editor
) -> Value | None:
    """Casts to a wider dtype in front of the product are part of how it is computed."""
    source, own = node, labels
    while is_look(source) and (step := behind(source, own, found.atoms)) is not None:
        if is_op(source, aten.to, aten._to_copy, aten.type_as) and value(step[0]).dtype == value(found.root).dtype:
            node, labels = step
        source, own = step
    x = arranged(node, labels, groups, found.atoms, edit)
    if x is None:
        return None
    x = x.to(value(found.root).dtype)
    return _expanded(x, groups, found, edit)


def _expanded(x: Value, groups: list[tuple[int, ...]], found: Attention, edit: Editor) -> Value | None:
    """Batch axes that the operand lacks, by expansion."""
    sizes: list[object] = []
    for axis, group in enumerate(groups):
        own = shape(x.node)[axis]
        if group and isinstance(own, int) and own == 1:
            total = [found.atoms.sizes[a] for a in group]
            if not all(isinstance(s, int) for s in total):
                return _expanded_like(x, axis, group, found, edit)
            sizes.append(math.prod(int(s) for s in total))
        else:
            sizes.append(-1)
    return x if all(s == -1 for s in sizes) else edit.call(aten.expand.default, x, sizes)


def _expanded_like(x: Value, axis: int, group: tuple[int, ...], found: Attention, edit: Editor) -> Value | None:
    for node, labels in ((found.q, found.q_labels), (found.k, found.k_labels), (found.v, found.v_labels)):
        own = found.atoms.settled(labels)
        if group in own:
            size = edit.call(aten.sym_size.int, node, own.index(group))
            return edit.call(aten.expand.default, x, [size if i == axis else -1 for i in range(x.ndim)])
    return None


def _call(
    found: Attention, q: Value, k: Value, v: Value, mask: Value | None, causal: bool, heads: list[tuple[int, ...]],
    edit: Editor,
) -> Value | None:  # fmt: skip
    missing = max(0, 4 - q.ndim)
    for _ in range(missing):  # torch's fast kernels want batch and heads
        place = 1 if q.ndim == 3 else 0
        q, k, v = (edit.call(aten.unsqueeze.default, x, place) for x in (q, k, v))
        mask = None if mask is None else edit.call(aten.unsqueeze.default, mask, place)
    depth = shape(q.node)[-1]
    scale = found.scores.scale
    if found.scores.by_depth:
        q, scale = (q if scale == 1.0 else q * scale), 1 / math.sqrt(depth) if isinstance(depth, int) else None
    plain = isinstance(depth, int) and scale is not None and abs(scale * math.sqrt(depth) - 1) < 1e-12
    y = edit.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal,
        scale=None if plain else scale, enable_gqa=bool(found.shared),
    )  # fmt: skip
    for _ in range(missing):
        y = edit.call(aten.squeeze.dim, y, 1 if y.ndim == 4 else 0)
    groups = [*heads, found.queries, found.width]
    labels: Labels = [tuple(g) for g in groups]
    out = arranged(y.node, labels, found.atoms.settled(found.out), found.atoms, edit)
    return None if out is None else out.to(value(found.root).dtype)


RULE = Transform("raise_attention", exactness=Exactness.ALGEBRAIC, phase=Phase.RAISE, run=run)

__all__ = ["RULE"]
