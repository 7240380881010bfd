"""Optimize a model and write it as ONNX: the same as `normfuse convert`."""

import typer

from normfuse.cli.main import convert

if __name__ == "__main__":
    typer.run(convert)
