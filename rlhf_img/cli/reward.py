"""`rlhf-img reward`: list the rewards there are, score images with them, train the ones that are learned.

`reward probe` has a file of its own, `probe.py`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_img.cli import aesthetic, probe
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.rewards import Images, Scores
    from rlhf_img.rewards.artifact_training import ArtifactTraining, CleanTransform, Playground
    from rlhf_img.rewards.photo_pairs import Photographs
    from rlhf_img.rubrics.schema import Rubric

app = typer.Typer(
    help="List rewards, score images, probe rewards for hacks, train the rewards that are learned.",
    no_args_is_help=True,
)
train = typer.Typer(help="Train a learned reward.", no_args_is_help=True)
app.add_typer(train, name="train")
app.command("probe")(probe.probe)
train.command("aesthetic")(aesthetic.train)


@app.command("list")
def list_rewards(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every reward that can be asked for by name.

    Example: rlhf-img reward list
    """
    from rlhf_img.rewards import known_rewards

    rows = [_row(name, source) for name, source in known_rewards().items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "role", "range", "source", "what it scores", "weights it needs")
    for row in rows:
        table.add_row(*(row[key] for key in ("name", "role", "range", "source", "about", "needs")))
    Console().print(table)


@app.command("score")
def score_images(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files of one size.")],
    prompt: Annotated[str, typer.Option(help="What the images should show.")],
    rewards: Annotated[
        str, typer.Option(metavar="SPEC", help='Such as "rubric,artifact" or "my_rewards.py:neon".')
    ] = "rubric,artifact",
    rubric: Annotated[
        Path | None, typer.Option(help="A rubric file to use instead of decomposing the prompt.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score images with rewards, without training anything.

    Example: rlhf-img reward score a.png b.png --prompt "two red circles on grey" --rewards rubric,artifact
    """
    from rlhf_img.rewards import load_rewards, score

    chosen = load_rewards(rewards)
    batch = _open(images)
    columns: dict[str, list[Any]] = {} if rubric is None else {"rubrics": [_rubric(rubric)] * len(batch)}
    scores = score(chosen, [prompt] * len(batch), batch, columns, max_unscored=1.0)
    if as_json:
        typer.echo(json.dumps(_as_json(images, scores), indent=2))
        return
    _print_scores(images, scores)


@train.command("artifact")
def train_artifact(
    out: Annotated[Path, typer.Option(help="The weights to write; their card goes beside them.")] = Path(
        "artifact.safetensors"
    ),
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Learn from the pictures in it, not from the playground.")
    ] = None,
    side: Annotated[
        int, typer.Option(help="With --images: side in px of the images to judge; half to twice of it is accepted.")
    ] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps [default: as for the shipped one].")] = None,
    vae: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help='Half of the images go through its autoencoder; "none": none do. '
                     '[default: playground; with --images: none]'),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Train a head on this frozen SigLIP, SigLIP 2, DINOv2 or DINOv3 (hub id or "
                     "folder), not the small network."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything; also of which pictures are held out.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where a run to the same --out stopped.")] = False,
) -> None:
    """Make weights of the artifact reward from a folder of your own pictures, or from the playground's renderer.

    From the playground it takes 25 minutes on one CPU core and makes the shipped ones. Local defects are put into one
    of two twins, and both get the same look. With --vae it learns that what an autoencoder does to a clean image is no
    defect either.

    Example: rlhf-img reward train artifact --images photos --out my/artifact.safetensors --resume

    Use them with the reward {reward: artifact, options: {weights: my/artifact.safetensors}}.
    """
    from rlhf_img.rewards.artifact_training import ArtifactTraining, Playground

    if images is None and side != Playground.side:
        raise RlhfImgError(f"--side {side} is for your own pictures: give their folder with --images")
    config = ArtifactTraining(seed=seed) if steps is None else ArtifactTraining(seed=seed, steps=steps)
    source = Playground() if images is None else _photographs(images, side, seed)
    through = vae or ("playground" if images is None else "none")
    card = _fit(out, config, source, through, resume, backbone)
    _draw_curve(card["curve"], out.with_suffix(".png"))
    typer.echo(json.dumps(card["heldout"], indent=2))
    typer.echo(f"Wrote {out}, {out.with_suffix('.json')} and {out.with_suffix('.png')}")


def _photographs(folder: Path, side: int, seed: int) -> "Photographs":
    from rlhf_img.rewards.folder_images import read_folder, summary
    from rlhf_img.rewards.photo_pairs import Photographs, check_side

    check_side(side)
    source = Photographs(folder=read_folder(folder, side, seed=seed), side=side)
    typer.echo(f"{len(source.train)} pictures to learn from, {len(source.heldout)} held out to measure on")
    for what, files in (("Converted", source.folder.read_as), ("Skipped", source.folder.skipped)):
        if files:
            typer.echo(f"{what}: {summary(files)}")
    return source


def _fit(
    out: Path, config: "ArtifactTraining", source: "Playground | Photographs", vae: str, resume: bool,
    backbone: str | None,
) -> dict[str, Any]:
    from rich.progress import Progress

    from rlhf_img.rewards.artifact_training import train_artifact as fit

    through = None if vae == "none" else _autoencoder(vae)
    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=config.steps)

        def show(step: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"loss {loss:.3f}")

        return fit(out, config, source=source, resume=resume, clean_transform=through, backbone=backbone,
                   progress=show)


def _autoencoder(model: str) -> "CleanTransform":
    from functools import partial

    from rlhf_img.model.loading import load
    from rlhf_img.model.vae import reconstruct

    return partial(reconstruct, load(model))


def _draw_curve(curve: list[dict[str, float]], out: Path) -> None:
    """The loss and the held-out AUC over the steps, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, key, title in zip(figure.subplots(1, 2), ("loss", "heldout_auc"), ("training loss", "held-out AUC"),
                                strict=True):
        axes.plot([point["step"] for point in curve], [point[key] for point in curve], marker=".")
        axes.set(title=title, xlabel="step")
    figure.savefig(out, dpi=100)


def _row(name: str, source: str) -> dict[str, str]:
    """One line of the list; a plug-in that does not load is shown with the reason, not left out."""
    from rlhf_img.rewards import load_rewards

    try:
        (reward,) = load_rewards([{"reward": name}])
    except RlhfImgError as error:
        return {"name": name, "role": "-", "range": "-", "source": source, "needs": "-",
                "about": f"does not load: {error}"}
    low, high = reward.range
    about = (_doc(reward.fn) or "").strip().partition("\n")[0]
    return {"name": name, "role": reward.role, "range": f"{low:g} to {high:g}", "source": source, "about": about,
            "needs": reward.needs}


def _doc(fn: Callable[..., Any]) -> str | None:
    return fn.__doc__


def _open(paths: list[Path]) -> "Images":
    from PIL import Image, UnidentifiedImageError

    from rlhf_img.rewards import Images

    opened = []
    for path in paths:
        try:
            opened.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise RlhfImgError(f"{path} cannot be read as an image: {error}") from error
    return Images.from_pil(opened)


def _rubric(path: Path) -> "Rubric":
    from rlhf_img.rubrics.files import load_rubrics

    rubrics = load_rubrics(path)
    if len(rubrics) != 1:
        raise RlhfImgError(f"{path} holds {len(rubrics)} rubrics; one prompt is scored with one")
    return rubrics[0]


def _as_json(paths: list[Path], scores: "Scores") -> dict[str, Any]:
    rows = [[None if math.isnan(value) else value for value in row] for row in scores.values_BK.tolist()]
    return {
        "scores": [{"image": str(path), **dict(zip(scores.names, row, strict=True))}
                   for path, row in zip(paths, rows, strict=True)],
        "unscored": dict(scores.unscored),
        "seconds": dict(scores.seconds),
    }


def _print_scores(paths: list[Path], scores: "Scores") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("image", *scores.names)
    for path, row in zip(paths, scores.values_BK.tolist(), strict=True):
        table.add_row(str(path), *("unscored" if math.isnan(value) else f"{value:.3f}" for value in row))
    console = Console()
    console.print(table)
    for name, reasons in scores.unscored.items():
        for reason, count in reasons.items():
            console.print(f"{name}: {count} unscored: {reason}", markup=False)
