"""Raising: any subgraph that computes a known function becomes its one canonical operator."""

from normfuse.raise_.rules import RULES

__all__ = ["RULES"]
