"""`rlhf-img reward train aesthetic`: a reward from preference pairs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_img.errors import RlhfImgError


def train(
    pairs: Annotated[Path, typer.Option(metavar="DATA", help="Preference pairs: a Parquet file or a folder of them.")],
    out: Annotated[
        Path | None,
        typer.Option(help="What to write [default: aesthetic.safetensors, with its card beside it; with --vlm: the "
                     "folder aesthetic]."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="MAP", help='Other column names: "prompt=caption,image_0=jpg_0,...".')
    ] = None,
    backbone: Annotated[
        str, typer.Option(metavar="MODEL", help='Frozen; a SigLIP, SigLIP 2, DINOv2 or DINOv3 (hub id or folder), or '
                          '"artifact": the small network that ships with the package.'),
    ] = "artifact",
    vlm: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Train a LoRA on this vision-language model, which sees the prompt too, "
                     'with TRL; a hub id, a folder, or "playground".'),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps [default: 600].")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pairs a step [default: 128; with --vlm: 8].")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate [default: 1e-3; with --vlm: 1e-4].")] = None,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Refuse data with a greater share of bad pairs.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where a run to the same --out stopped.")] = False,
) -> None:
    """Learn from preference pairs how likely people prefer an image (Bradley-Terry).

    A tenth of the prompts is held out, and another calibrates the probabilities. The card has the held-out accuracy.

    Examples:

        rlhf-img reward train aesthetic --pairs human --backbone google/siglip2-base-patch16-256

        rlhf-img reward train aesthetic --pairs human --vlm Qwen/Qwen3-VL-4B-Instruct --out taste

    Use it with the reward {reward: aesthetic, options: {weights: aesthetic.safetensors}}.
    """
    from rlhf_img.training.pairs import parse_columns, survey

    if vlm is not None and backbone != "artifact":
        raise RlhfImgError("--backbone is for a head and --vlm for a whole model: give one of them")
    mapping = parse_columns(columns)
    for line in survey(pairs, mapping, max_bad=max_bad).lines():
        typer.echo(line)
    given = {"steps": steps, "pairs": batch, "lr": lr, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not None}
    target = out or Path("aesthetic.safetensors" if vlm is None else "aesthetic")
    card = _fit(target, chosen, pairs, mapping, backbone, vlm, resume)
    typer.echo(json.dumps({part: card[part] for part in ("pairs", "train", "heldout")}, indent=2))
    typer.echo(f"Wrote {target}; use it with {{reward: aesthetic, options: {{weights: {target}}}}}")


def _fit(
    out: Path, settings: dict[str, Any], pairs: Path, columns: dict[str, str], backbone: str, vlm: str | None,
    resume: bool,
) -> dict[str, Any]:  # fmt: skip
    from functools import partial

    from rich.progress import Progress

    from rlhf_img.rewards.aesthetic_training import AestheticTraining, train_aesthetic
    from rlhf_img.rewards.vlm_training import VLMTraining, train_vlm
    from rlhf_img.training.pairs import read_pairs

    read = partial(read_pairs, pairs, columns)
    with Progress(transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        if vlm is None:
            return train_aesthetic(
                out, AestheticTraining(**settings), read, backbone=backbone, resume=resume, show=show
            )
        return train_vlm(out, VLMTraining(**settings), read, vlm, resume=resume, show=show)
