"""merge_lora:  linear(x, W) + s * linear(linear(x, A), B)  ->  linear(x, W + s B A)

Exactness: algebraic.
Legal if:  base and adapter read the same tensor, W, A, B and s are parameters or numbers, and nothing else reads what
           stands between: linears, convolutions (A k x k and B 1 x 1), embeddings; rsLoRA differs in s alone. The base
           may flatten the tokens (GPT-2's layout), the adapter may read sums or means of groups of channels (QA-LoRA, Bone).
Leaves alone: adapters whose dropout is active, whose scale depends on the input, or that have no base beside them.
Reference: METHODS 1.11, 1.16; Hu et al. 2021 (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.kernels import ingredients, write_terms
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap, Channelwise, Composed, Own, Sum
from normfuse.graph.node import aten, is_op, op_name, site
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    affine = Affine(program)
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node.op != "call_function":
            continue
        terms = affine(node)
        adapted = [t.map for t in terms if _is_adapted(t.map)]
        if not adapted:
            _explain(node, affine, edit)
        elif edit.permit(node):
            edit.fired(node, before=ingredients(adapted), after=_after(adapted[0]))
            write_terms(edit, node, terms)


def _after(m: AffineMap) -> str:
    return "embedding" if m.table else "one convolution" if m.windows else "one linear"


def _is_adapted(m: AffineMap) -> bool:
    """A sum of a full map and a narrow one, however scaled."""
    return m.merged and _narrow(m) and _full(m)


def _narrow(m: AffineMap) -> bool:
    """Does some summand go through fewer channels than it reads and writes?"""
    recipe = m.recipe
    if isinstance(recipe, Sum):
        return any(_narrow(t.map) for t in recipe.terms)
    if isinstance(recipe, Channelwise):
        return _narrow(recipe.inner)
    if not isinstance(recipe, Composed) or recipe.outer.diagonal:
        return False
    middle = recipe.outer.inputs
    return not recipe.inner.diagonal and middle < min(recipe.inner.inputs, recipe.outer.outputs)


def _full(m: AffineMap) -> bool:
    """Is some summand a projection or an embedding with weights of its own?"""
    recipe = m.recipe
    if isinstance(recipe, Sum):
        return any(_full(t.map) for t in recipe.terms)
    return _full(recipe.inner) if isinstance(recipe, Channelwise) else isinstance(recipe, Own)


def _explain(node: fx.Node, affine: Affine, edit: Editor) -> None:
    """An adapter beside a base that it does not share its input with."""
    if not is_op(node, aten.add):
        return
    maps = [t.map for t in affine(node)]
    adapters = [m for m in maps if _narrow(m)]
    bases = [m for m in maps if not _narrow(m) and _full(m)]
    if adapters and bases:
        first, other = adapters[0].source, bases[0].source
        names = f"{op_name(first)} at {site(first)} and {op_name(other)} at {site(other)}"
        edit.refuse(node, f"the adapter and its base read different tensors: {names}")


RULE = Transform("merge_lora", exactness=Exactness.ALGEBRAIC, run=run)
