"""Facts about a program: pure functions, computed when asked for and dropped when the graph changes."""

from normfuse.analysis.facts import Facts

__all__ = ["Facts"]
