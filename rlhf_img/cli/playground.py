"""`rlhf-img playground`: look at the embedded world, and make its model again."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The embedded world and its model.", no_args_is_help=True)


@app.command()
def render(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("playground.png"),
    split: Annotated[str, typer.Option(help="train, val or heldout.")] = "train",
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 24,
    scale: Annotated[int, typer.Option(min=1, help="Size of a pixel.")] = 2,
) -> None:
    """Draw scenes of the playground and print their captions.

    Example: rlhf-img playground render --split heldout --count 12 --out heldout.png
    """
    import numpy as np
    from PIL import Image

    from rlhf_img.errors import RlhfImgError, did_you_mean
    from rlhf_img.playground.data import example
    from rlhf_img.playground.scene import SPLITS

    if split not in SPLITS:
        raise RlhfImgError(f'there is no split "{split}"; {did_you_mean(split, SPLITS)}')
    examples = [example(seed + i, split) for i in range(count)]
    columns = min(count, 8)
    side = examples[0].image.shape[0]
    page = np.zeros((-(-count // columns) * side, columns * side, 3), np.uint8)
    for i, item in enumerate(examples):
        y, x = i // columns * side, i % columns * side
        page[y : y + side, x : x + side] = item.image
        typer.echo(f"{i:3}  {item.caption}")
    picture = Image.fromarray(page)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(out)
    typer.echo(out)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")] = Path("playground-model"),
    work: Annotated[
        Path, typer.Option(help="Checkpoints and picture grids; a killed run goes on from here.")
    ] = Path("runs/pretrain"),
    start: Annotated[
        Path | None, typer.Option(help="A pipeline folder to go on from: only its transformer is trained.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the transformer.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
) -> None:
    """Make the embedded model from rendered scenes alone: text encoder, autoencoder, diffusion transformer.

    Then it is measured, and its card written. Hours on two CPU cores; run it again to go on after an interruption.

    Example: rlhf-img playground pretrain --out my-model && rlhf-img grpo --model my-model --prompts prompts.txt
    """
    from rlhf_img.playground.pretrain import PretrainConfig
    from rlhf_img.playground.pretrain import pretrain as make
    from rlhf_img.training.model_card import measure, write_card

    config = PretrainConfig(seed=seed)
    if steps is not None:
        config = replace(config, dit=replace(config.dit, steps=steps))
    make(config, work, out, start)
    write_card(out, config, measure(out))
    typer.echo(out / "README.md")


@app.command("train-judge")
def train_judge(
    out: Annotated[Path, typer.Option(help="The folder to write; give it to --judge-model.")] = Path(
        "playground-judge"
    ),
    work: Annotated[Path, typer.Option(help="Images and checkpoints; a killed run goes on from here.")] = Path(
        "runs/judge"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps [default: 4000].")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, images and batches.")] = 0,
) -> None:
    """Make the playground's judge: a small vision-language model that answers yes/no questions about its images.

    Then it is measured against the exact checks, and its card written. Run it again to go on after an interruption.
    The package brings a trained one, --judge-model playground; its card beside the weights has its scores.

    Example: rlhf-img playground train-judge --out my-judge && rlhf-img doctor --judge-model my-judge
    """
    from rlhf_img.training.judge import JudgeTraining
    from rlhf_img.training.judge import train_judge as make
    from rlhf_img.training.judge_card import measure_judge, write_judge_card

    config = JudgeTraining(seed=seed)
    if steps is not None:
        config = replace(config, fit=replace(config.fit, steps=steps))
    make(config, work, out)
    write_judge_card(out, config, measure_judge(out))
    typer.echo(out / "README.md")
