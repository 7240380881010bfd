"""How the time of raising and of the passes grows with depth, and the peak memory of one whole optimization.

python tools/bench_passes.py                # 12, 24 and 48 layers of a narrow GPT-2
python tools/bench_passes.py --raise        # raising alone: GPT-2, Llama and Gemma 3 of 12, 48 and 96 layers
python tools/bench_passes.py --memory       # GPT-2 of 124M parameters: seconds by stage, peak memory
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import normfuse

ROUNDS = 5
DEPTHS = (12, 24, 48)
RAISED = (12, 48, 96)


def gpt2(layers: int, width: int, heads: int, vocabulary: int) -> torch.nn.Module:
    """GPT-2 with gains and shifts away from their defaults."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def seconds(layers: int) -> dict[str, float]:
    """Median over rounds; nothing is verified, so that only capture, raising, passes and bake run."""
    model, ids = gpt2(layers, 64, 4, 128), torch.randint(0, 128, (1, 16))
    runs = [normfuse.optimize(model, (ids,), verify=False).report.seconds for _ in range(ROUNDS)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in ("capture", "raise", "passes", "bake")}


def depths(console: Console) -> None:
    table = Table(
        "layers", "capture s", "raise s", "passes s", "bake s", "raise, times 12 layers", "passes, times 12 layers"
    )
    first: dict[str, float] = {}
    for layers in DEPTHS:
        found = seconds(layers)
        first = first or found
        ratios = [f"{found[stage] / first[stage]:.2f}" for stage in ("raise", "passes")]
        table.add_row(str(layers), *(f"{value:.3f}" for value in found.values()), *ratios)
    console.print(table)


def raised(name: str, layers: int) -> tuple[int, float]:
    """(nodes, seconds): the least of several rounds, of raising alone."""
    transformers: Any = importlib.import_module("transformers")
    narrow = {
        "num_hidden_layers": layers, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 128,
    }  # fmt: skip
    build: dict[str, Callable[[], torch.nn.Module]] = {
        "gpt2": lambda: gpt2(layers, 64, 4, 128),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**narrow)),
        "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**narrow, head_dim=16)),
    }
    free = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    given = {"input_ids": torch.randint(0, 128, (2, 16)), "use_cache": False}
    exported = torch.export.export(build[name]().eval(), (), given, dynamic_shapes=free, strict=False)
    runs = [normfuse.optimize(exported, (), given, passes=[], verify=False) for _ in range(ROUNDS)]
    return len(exported.graph.nodes), min(run.report.seconds["raise"] for run in runs)


def raising(console: Console) -> None:
    table = Table("model", "layers", "nodes", "raise s", "us a node", "times 12 layers", "nodes, times 12 layers")
    for name in ("gpt2", "llama", "gemma3"):
        first: tuple[int, float] | None = None
        for layers in RAISED:
            nodes, least = raised(name, layers)
            first = first or (nodes, least)
            each = f"{1e6 * least / nodes:.0f}"
            ratios = (f"{least / first[1]:.2f}", f"{nodes / first[0]:.2f}")
            table.add_row(name, str(layers), str(nodes), f"{least:.3f}", each, *ratios)
    console.print(table)


class Peak(threading.Thread):
    """The largest resident set while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.bytes, self.over = psutil.Process(), 0, False

    def run(self) -> None:
        while not self.over:
            self.bytes = max(self.bytes, self.process.memory_info().rss)
            time.sleep(0.002)


def growth(work: Callable[[], Any]) -> tuple[int, Any]:
    """The largest growth of the resident set while `work` runs, in bytes, and what it returns."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    peak = Peak()
    peak.start()
    result = work()
    peak.over = True
    peak.join()
    return peak.bytes - before, result


def memory(console: Console, tokens: int) -> None:
    """Everything is imported and has run once before the measurement, and freed memory is the system's again."""
    model, ids = gpt2(12, 768, 12, 50257), torch.randint(0, 50257, (1, tokens))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(ids)
    normfuse.optimize(gpt2(1, 32, 2, 64), (ids % 64,))
    for_capture, _ = growth(lambda: torch.export.export(model, (ids,)) and None)
    grown, optimized = growth(lambda: normfuse.optimize(model, (ids,)))
    console.print(str(optimized.report))
    ratio = (weights + grown) / weights
    console.print(f"weights {weights / 1e6:.0f} MB, {tokens} tokens: model and growth at the peak {ratio:.2f} times that")
    console.print(f"of which torch.export alone takes {for_capture / weights:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="seconds and peak memory of GPT-2 124M instead of depths")
    parser.add_argument("--tokens", type=int, default=32, help="length of the example: verification holds its logits")
    parser.add_argument("--raise", action="store_true", dest="raising", help="raising alone, of three models")
    given = parser.parse_args()
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")
    if given.memory:
        memory(console, given.tokens)
    else:
        (raising if given.raising else depths)(console)


if __name__ == "__main__":
    main()
