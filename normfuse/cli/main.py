"""The command `normfuse`: thin words over the public functions."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import normfuse
from normfuse.cli.bench import bench
from normfuse.errors import NormfuseError

MODEL_HELP = (
    "What to work on: package.module:callable returning (module, args) or (module, args, kwargs); a .pt2 file; or a "
    "specimen such as gpt, llama, vit, bert, resnet (a config of it after @: gpt@gpt2-124m)."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Passes = Annotated[list[str] | None, typer.Option("--pass", "-p", help="Run only this pass (may be given often).")]
Disable = Annotated[list[str] | None, typer.Option("--disable", "-d", help="Leave this pass out (may be given often).")]

app = typer.Typer(
    name="normfuse",
    help="See through a model's norms, rewrite them exactly, prove the result, and lower it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)


@contextlib.contextmanager
def _stages(title: str) -> Generator[None]:
    """A spinner that says what is being done."""
    from rich.markup import escape

    from normfuse.progress import shown

    with _err.status(title) as status, shown(lambda doing: status.update(f"{title}: {escape(doing)}")):
        yield


def _load(text: str) -> Any:
    from normfuse.named_model import find

    with _err.status(f"loading {text}"):
        return find(text)


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of a table.")] = False,
) -> None:
    """Print every norm, softmax and attention of a model: kind, count, role, axes, eps, cost on the example, place.

    Example: normfuse inspect gpt
    """
    from normfuse.show.terminal import renderable

    found = _load(model)
    with _stages("capturing and recognising"):
        inventory = normfuse.inspect(found.model, found.args, found.kwargs)
    if as_json:
        print(json.dumps(inventory.to_dict(), indent=2, default=str))
    else:
        (_out if _out.is_terminal else Console(width=120)).print(renderable(inventory.page()))


@app.command()
def optimize(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as a .pt2 archive.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report: .html for people, .json for programs.")] = None,
    only: Passes = None,
    disable: Disable = None,
    backend: Annotated[str, typer.Option(help="How the result is to run.")] = "torch",
    verify: Annotated[bool, typer.Option(help="Prove the result in float64 and in the model's own dtype.")] = True,
) -> None:
    """Rewrite a model, prove that it computes the same, and print what was done where.

    Example: normfuse optimize vit -o vit.pt2 --report vit.html
    """
    from normfuse.show.terminal import renderable

    found = _load(model)
    with _stages("optimizing"):
        optimized = normfuse.optimize(
            found.model, found.args, found.kwargs, passes=only or None, disable=disable or (), backend=backend, verify=verify
        )
    _out.print(renderable(optimized.report.page()))
    if output is not None:
        optimized.save(output)
        _out.print(f"wrote {output}")
    if report is not None:
        optimized.report.save(report)
        _out.print(f"wrote {report}")


@app.command()
def verify(
    reference: Model,
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The model to compare, named like MODEL.")],
    trials: Annotated[int, typer.Option(help="How many draws of inputs to compare on.")] = 3,
) -> None:
    """Compare two models in float64 and in their own dtype. Exit status 1 if they are not the same function.

    Example: normfuse optimize gpt -o gpt.pt2 && normfuse verify gpt gpt.pt2
    """
    left, right = _load(reference), _load(candidate)
    with _stages("running both"):
        verdict = normfuse.verify(left.model, right.model, left.args, left.kwargs, trials=trials)
    _out.print(str(verdict), style="green" if verdict else "bold red")
    raise typer.Exit(0 if verdict else 1)


@app.command()
def explain(
    model: Model, pass_name: Annotated[str, typer.Argument(metavar="PASS", help="A pass, e.g. layer_norm_to_rms_norm.")]
) -> None:
    """Tell where a pass fires in a model, where it does not, and why not.

    Example: normfuse explain bert layer_norm_to_rms_norm
    """
    found = _load(model)
    text = normfuse.explain(found.model, pass_name, found.args, found.kwargs)
    _out.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The .onnx file to write.")],
    target: Annotated[str, typer.Option(help="onnxruntime, or onnx for standard operators alone.")] = "onnxruntime",
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the newest that the target runs if left out.")] = None,
) -> None:
    """Optimize a model and write it as ONNX.

    Example: normfuse convert resnet resnet.onnx
    """
    found = _load(model)
    with _stages("optimizing and exporting"):
        written = normfuse.export_onnx(found.model, output, found.args, found.kwargs, target=target, opset=opset)
    _out.print(str(written), highlight=False)


app.command()(bench)


@app.command()
def passes() -> None:
    """List the passes in the order in which they run."""
    from rich.table import Table

    from normfuse.api import pass_table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("pass", "exactness", "what it does"):
        table.add_column(title, overflow="fold")
    for rule in pass_table():
        first = " ".join(rule.doc.split("\n\n")[0].split()).partition(":")[2].strip()
        table.add_row(rule.name + (" (by name only)" if rule.on_request else ""), rule.exactness.value, first)
    _out.print(table)


def main(argv: list[str] | None = None) -> None:
    """Entry point. What normfuse raises on purpose is one red line and exit status 2."""
    try:
        app(args=argv)
    except NormfuseError as error:
        _err.print(f"normfuse: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
