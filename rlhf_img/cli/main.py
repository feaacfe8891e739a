"""The command `rlhf-img`: every command in one app, and errors of the user without a traceback."""

import ctypes
import os
import platform
import sys
from typing import Annotated

import typer

from rlhf_img import __version__
from rlhf_img.cli import (
    align,
    annotate,
    doctor,
    evaluation,
    export,
    look,
    pairs,
    playground,
    prompts,
    report,
    reward,
    rubric,
)
from rlhf_img.errors import RlhfImgError

app = typer.Typer(
    help="Align flow-matching image models: rubrics and artifact rewards, GRPO, and a report one can believe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for algorithm in ("grpo", "nft"):
    app.command(algorithm)(align.online(algorithm))
app.command("dpo")(align.dpo)
app.command("tdm")(align.tdm)
app.command("sft")(align.sft)
app.command("export")(export.export)
app.command("sample")(look.sample)
app.command("report")(report.report)
app.command("annotate")(annotate.annotate)
app.command("doctor")(doctor.doctor)
app.add_typer(evaluation.app, name="eval")
app.add_typer(pairs.app, name="pairs")
app.add_typer(prompts.app, name="prompts")
app.add_typer(rubric.app, name="rubric")
app.add_typer(reward.app, name="reward")
app.add_typer(playground.app, name="playground")


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 2 user error, 1 our error, 3 stopped by a check."""
    keep_freed_memory()
    # Progress bars of libraries would write over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except RlhfImgError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.secho("interrupted: go on from the last checkpoint with --resume", err=True, fg="yellow")
        sys.exit(130)


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors: returning it to the system and faulting it in again is about a
    quarter of the time of a small model's training step on a CPU. Nothing happens with another C library."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # numbers of <malloc.h>
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**25)


if __name__ == "__main__":
    main()
