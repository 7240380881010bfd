"""Time models against their peers: the same as `normfuse bench`."""

import typer

from normfuse.cli.main import bench

if __name__ == "__main__":
    typer.run(bench)
