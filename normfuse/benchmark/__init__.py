"""Benchmarks: models by contenders, one process each, in alternating rounds."""

from normfuse.benchmark.result import Result, read
from normfuse.benchmark.rounds import ACCEPTANCE, CONTENDERS, Plan, estimate, run_benchmark

__all__ = ["ACCEPTANCE", "CONTENDERS", "Plan", "Result", "estimate", "read", "run_benchmark"]
