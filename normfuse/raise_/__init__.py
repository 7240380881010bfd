"""Raising: any subgraph that computes a known function becomes its one canonical operator."""

from normfuse.raise_ import attention, frozen, functions, normal_forms

RULES = (normal_forms.RULE, functions.RULE, frozen.RULE, attention.RULE)

__all__ = ["RULES"]
