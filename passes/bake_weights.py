"""bake_weights:  f(parameters)  ->  one parameter

Exactness: algebraic.
Legal if:  f reads parameters and buffers alone and draws no random numbers: weight_norm, spectral_norm, weight
           standardization, any parametrization, a table computed from constants.
Leaves alone: anything that is random, that reads an input, or that only looks at a parameter through a view.
Reference: METHODS 1.6 to 1.9; Salimans & Kingma 2016 (arXiv 1602.07868), eq. 2.
"""

from __future__ import annotations

from torch import fx

from normfuse.analysis import Facts
from normfuse.graph.node import op_name
from normfuse.graph.program import Program
from normfuse.graph.roles import frontier, is_random, weight_only
from normfuse.rewrite import Editor, Exactness, Phase, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    """Nothing is computed here: the sites are only named, and `bake` evaluates them in the end."""
    for node in frontier(program):
        if edit.permit(node):
            edit.mark_weight(node)
            edit.fired(node, before=_text(node), after="parameter")
    fixed = facts(weight_only)
    for node in program.graph.nodes:
        if is_random(node) and any(n in fixed for n in node.all_input_nodes):
            edit.refuse(node, f"{op_name(node)} draws random numbers: the weight differs from call to call")


def _text(node: fx.Node) -> str:
    return f"{op_name(node)} of parameters"


RULE = Transform("bake_weights", exactness=Exactness.ALGEBRAIC, phase=Phase.RAISE, run=run)
