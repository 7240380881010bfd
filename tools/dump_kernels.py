"""Writes generated Triton kernels as files that a person can read, run and ship: they need torch and triton alone.

python tools/dump_kernels.py kernels/                               every operator, forward and backward
python tools/dump_kernels.py kernels/ rms_norm --columns 4096 --dtype float16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import normfuse
from normfuse.functional import OPERATORS, kernel_source

OPTIONS = {"eps": 1e-6, "cast": "last", "scale": 1.0, "correction": 0, "place": "inside"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("operators", nargs="*", help="their names; all by default")
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.operators or [operator.name for operator in OPERATORS]:
        for backward in (False, True):
            try:
                text = kernel_source(name, asked.columns, getattr(torch, asked.dtype), backward=backward, **OPTIONS)
            except normfuse.NormfuseError as reason:
                print(f"{name}: {reason}")
                break
            path = asked.folder / f"{name}{'_backward' * backward}.py"
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
