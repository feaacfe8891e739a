"""`rlhf-img export`: what a run has trained, and whole models, for other tools."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A finished run, a diffusers model, or a .safetensors checkpoint.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    formats: Annotated[
        str | None,
        typer.Option("--format", metavar="LIST", help="Of lora, comfyui, pipeline, checkpoint [default: see above]."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For a .safetensors checkpoint: a pipeline that lends its other parts."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the transformer: float32 is exact, bfloat16 half as large.")] = (
        "float32"
    ),
) -> None:
    """Write what a run has trained for diffusers and ComfyUI, and convert whole models.

    OUT/lora is what Krea2Pipeline.load_lora_weights reads, right at scale 1.0. OUT/comfyui_lora.safetensors is the same
    with ComfyUI's names, right at strength 1.0. OUT/pipeline is what Krea2Pipeline.from_pretrained reads, with the
    adapter merged; a student of `rlhf-img tdm` is marked is_distilled: draw with its steps and guidance_scale=0.
    OUT/checkpoint.safetensors is the transformer in the layout of krea-ai/krea-2, which ComfyUI loads too.

    Without --format, a run is written as lora, comfyui and pipeline, a model as checkpoint, a checkpoint as pipeline.

    Examples:

        rlhf-img export runs/turbo --out turbo

        rlhf-img export runs/turbo --out turbo --format checkpoint --dtype bfloat16

        rlhf-img export raw.safetensors --like krea/Krea-2-Raw --out raw
    """
    from rlhf_img.training.export import export as write

    asked = [name.strip() for name in formats.split(",")] if formats else []
    for path in write(source, out, formats=asked, like=like, dtype=dtype):
        typer.echo(path)
