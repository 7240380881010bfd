"""Raising: any subgraph that computes a known function becomes its one canonical operator."""

from normfuse.recognise import normal_forms
from normfuse.recognise.attention import attention
from normfuse.recognise.rows import frozen, functions

RULES = (normal_forms.RULE, functions.RULE, frozen.RULE, attention.RULE)

__all__ = ["RULES"]
