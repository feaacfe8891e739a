"""`rlhf-img export`: a run's adapter, and its model merged, for stock pipelines."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged/--lora-only", help="Also a whole pipeline with the adapter in its weights.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Of the merged transformer: float32 is exact, bfloat16 half as large.")] = (
        "float32"
    ),
) -> None:
    """Write a run's LoRA, and a pipeline with it merged, for stock diffusers.

    OUT/lora is what Krea2Pipeline.load_lora_weights reads, right at scale 1.0; OUT/pipeline is what
    Krea2Pipeline.from_pretrained reads. A student of `rlhf-img tdm` is marked is_distilled: draw with its steps and
    guidance_scale=0.

    Example: rlhf-img export runs/turbo --out turbo
    """
    from rlhf_img.training.export import export_run

    for path in export_run(run, out, merged=merged, dtype=dtype):
        typer.echo(path)
