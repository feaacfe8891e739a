"""`rlhf-img report`: one HTML file on one run, or on several side by side."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write [default: report.html in the run's folder].")
    ] = None,
) -> None:
    """Write a standalone HTML report."""
    from rlhf_img.report import build  # so that other commands need not wait for it

    typer.echo(build(runs, out))
