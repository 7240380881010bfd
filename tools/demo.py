"""GPT-2 through the whole compiler: what is in it, what is rewritten and why, the proof, and ONNX that runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normfuse

CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model (default: 12, GPT-2 of 124M)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    show(gpt2(given.layers), given.out)


def show(model: nn.Module, out: Path) -> None:
    args = (tokens(batch=2, length=64),)
    with step("find the norms"):
        inventory = normfuse.inspect(model, args)
    say(inventory)

    with step("rewrite and verify"):
        optimized = normfuse.optimize(model, args)
    say(optimized.report)

    with step("verify once more, on inputs of another size"):
        proof = normfuse.verify(model, optimized, (tokens(batch=1, length=96),), trials=1)
    with step("export to ONNX"):
        exported = out / "gpt2.onnx"
        said = optimized.export_onnx(exported)
    say(said)
    with step("run the ONNX file in onnxruntime"):
        error = onnx_error(model, exported, [args[0], tokens(batch=1, length=17)])

    optimized.report.save(str(out / "report.html"))
    optimized.report.save(str(out / "report.json"))
    CONSOLE.print(verdict(proof, error))
    CONSOLE.print(f"In {out}: report.html to read, report.json, and {exported.name} to run.")


def gpt2(layers: int) -> nn.Module:
    """The architecture of GPT-2 with 124M parameters (at 12 layers), every parameter away from its default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    with step(f"build GPT-2 with {layers} layers"), torch.no_grad():
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False)).eval()
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            spread = 0.1 if parameter.ndim == 1 else 0.02
            parameter.normal_(mean=1.0 if gain else spread / 4, std=spread)
    return model


def tokens(*, batch: int, length: int) -> Tensor:
    return torch.randint(50257, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def onnx_error(model: nn.Module, path: Path, batches: list[Tensor]) -> float:
    """How far onnxruntime's logits are from the model's, relative to their norm: the worst of the batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    errors: list[float] = []
    for ids in batches:
        found = torch.from_numpy(session.run(None, {given.name: ids.numpy()})[0]).double()
        with torch.no_grad():
            wanted = model(ids).logits.double()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return max(errors)


def verdict(proof: normfuse.Verification, onnx: float) -> Table:
    table = Table("question", "answer", title="Is it the same function?", title_justify="left")
    table.add_row("the same function", "yes" if proof else "no")
    table.add_row("error with both in float64", f"{proof.error_float64:.1e}")
    table.add_row("error in float32, the original's being 1", f"{proof.error_ratio:.2f}")
    table.add_row("error of the ONNX file in onnxruntime", f"{onnx:.1e}")
    return table


def say(what: object) -> None:
    """What normfuse prints, in its own layout."""
    CONSOLE.print(str(what), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def step(what: str) -> Generator[None]:
    start = time.perf_counter()
    with CONSOLE.status(what):
        yield
    CONSOLE.print(f"[green]done[/]  {what}  [dim]{time.perf_counter() - start:.1f} s[/]")


if __name__ == "__main__":
    main()
