"""Benchmarks: models by contenders, one process each, in alternating rounds."""

from normfuse.benchmark.rounds import CONTENDERS, Result, run_benchmark

__all__ = ["CONTENDERS", "Result", "run_benchmark"]
