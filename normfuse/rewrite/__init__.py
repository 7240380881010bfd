"""The engine of rewrites. It knows no concrete rule.

For writers of rules: nothing is changed while matching; every change goes through the editor, which keeps shapes,
provenance and order; a rule has a name and no state; a rule that can feed itself must shrink something, or the bounded
driver stops and names it; a refusal says why.
"""

from normfuse.rewrite.driver import Log, run_pass, run_passes
from normfuse.rewrite.each import computed, each
from normfuse.rewrite.editor import Editor, Value
from normfuse.rewrite.exactness import Exactness
from normfuse.rewrite.pattern import Param, Pattern, op
from normfuse.rewrite.rule import Match, Phase, Rewrite, Rule, Transform

__all__ = [
    "Editor", "Exactness", "Log", "Match", "Param", "Pattern", "Phase", "Rewrite", "Rule", "Transform", "Value",
    "computed", "each", "op", "run_pass", "run_passes",
]  # fmt: skip
