"""Modules of norms that torch lacks or spells otherwise."""

from normfuse.nn.rms_norm import RMSNorm

__all__ = ["RMSNorm"]
