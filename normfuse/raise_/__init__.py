"""Raising: any subgraph that computes a known function becomes its one canonical operator."""

from normfuse.raise_ import frozen, functions, normal_forms

RULES = (normal_forms.RULE, functions.RULE, frozen.RULE)

__all__ = ["RULES"]
