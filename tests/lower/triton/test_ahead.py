"""Kernels compiled for GPUs that are not there: no spill, 16-byte accesses, enough bytes under way."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

ROOT = Path(__file__).resolve().parents[3]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE = 128


def compiled(*requests: tuple[Any, ...]) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = [sys.executable, "-m", "tests.lower.triton.compiling", json.dumps(requests)]
    run = subprocess.run(code, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    for each in found:
        each["loads"] = {int(width): count for width, count in each["loads"].items()}
        each["stores"] = {int(width): count for width, count in each["stores"].items()}
    return found


def is_fast(facts: dict[str, Any], *, parameters: int = 0, share: float = 1.0) -> bool:
    """Nothing in local memory, matrices moved 16 bytes at once, and as much under way as the memory asks for.

    `parameters` of a kernel may move in narrower pieces, `share` is how much of the bytes that Little's law asks for.
    """
    narrow = max(sum(n for width, n in facts[which].items() if width < WIDE) for which in ("loads", "stores"))
    busy = facts["little"] is None or facts["little"][0] >= share * facts["little"][1]
    return facts["spilled"] == 0 and narrow <= parameters and busy and facts["shared"] <= 48 * 1024


def test_kernels_for_a_hopper_are_fast_and_slow_ones_are_told() -> None:
    """One warp for 4,096 columns cannot hold them; rows of 1,023 columns cannot be read 16 bytes at once."""
    spilling, forward, backward, narrow = compiled(
        ("rms_norm", 4096, "sm_90", True, ("tile", 4096, 1, 1)),
        ("softmax", 1024, "sm_90", False, None),
        ("layer_norm", 8192, "sm_90", True, None),
        ("softmax", 1023, "sm_90", False, None),
    )
    assert is_fast(forward) and is_fast(backward)
    assert spilling["spilled"] > 0 and not is_fast(spilling)
    assert set(narrow["loads"]) == {16} and not is_fast(narrow)


BYTES = {  # accesses of 2 bytes for each entry of a row, forward and backward
    "rms_norm": (2, 3), "layer_norm": (2, 3), "softmax": (2, 3), "add_rms_norm": (4, None), "carried_rms_norm": (None, 4),
    "dyt": (2, 3), "softmax_two_pass": (2, 3), "log_softmax": (2, 3), "crms_norm": (2, 3),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BYTES)
def test_kernels_are_fast_everywhere(name: str, target: str) -> None:
    ways = [backward for backward, accesses in zip((False, True), BYTES[name], strict=True) if accesses is not None]
    requests = [(name, n, target, backward, None) for n, backward in itertools.product((256, 1024, 8192, 16384), ways)]
    for request, facts in zip(requests, compiled(*requests), strict=True):
        single = 1 if name == "dyt" else 0
        parameters = 3 if request[1] < 1024 else single  # a row of 256 is less than 128 threads could load at once
        # A B200 asks for 43 KiB: rows of 8,192 fill three quarters of that, and statistics and sums hold registers.
        holding = facts["config"]["schedule"] == "sweeps" or request[3]
        share = (0.5 if holding else 0.7) if target == "sm_100" else 1.0
        assert is_fast(facts, parameters=parameters, share=share), (request, facts)
        assert sum(facts["bytes"]) == 2 * BYTES[name][request[3]], request
