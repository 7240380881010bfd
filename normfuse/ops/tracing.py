"""One lock for whatever computes with torch's stand-ins for tensors and sizes."""

from __future__ import annotations

import threading

TRACING = threading.RLock()
"""Held while torch traces or exports, and while anything computes with symbolic sizes or stand-ins for tensors.

Tracing patches modules, warnings and standard error for the whole process, and what other threads do with a symbolic size
meanwhile lands in its graph. Running is for any number of threads."""
