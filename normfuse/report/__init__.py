"""Reports: what was done, where, why not elsewhere, and how it was proved. Terminal, JSON and HTML."""

from normfuse.report.report import Report

__all__ = ["Report"]
