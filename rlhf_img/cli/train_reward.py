"""`rlhf-img reward train`: make the weights of the rewards that are learned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_img.cli import judge as options
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.rewards.artifact_labels import Labelled
    from rlhf_img.rewards.artifact_pairs import CleanTransform, Playground
    from rlhf_img.rewards.artifact_training import ArtifactTraining
    from rlhf_img.rewards.photo_pairs import Photographs

app = typer.Typer(help="Train a learned reward.", no_args_is_help=True)

Pictures = Annotated[
    Path | None,
    typer.Option("--images", metavar="FOLDER", help="Learn from the pictures in it, not from the playground."),
]
Side = Annotated[
    int, typer.Option(help="With --images: side in px of the images to judge; half to twice of it is accepted.")
]
Labels = Annotated[
    list[Path] | None,
    typer.Option(metavar="CSV", help="Labelled images to learn from as well: image,class,x,y,width,height. May be "
                 "given several times."),
]
Policy = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Draw images of this model or run and learn from them; their labels are the "
                 "playground's residual, or the judge's verdict."),
]
PolicyPrompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="With --policy: of what [default: the playground's].")
]
Appearance = Annotated[
    bool,
    typer.Option("--appearance", help="With --images: also learn blur, grain, noise, bokeh, exposure and compression, "
                 "for rewards that want them."),
]
Vae = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help='Half of the images go through its autoencoder; "none": none do. '
                 "[default: playground; with --images: none]"),
]
BackboneName = Annotated[
    str | None,
    typer.Option("--backbone", metavar="MODEL", help="A frozen SigLIP, SigLIP 2, DINOv2 or DINOv3 (hub id or folder), "
                 "not the small network."),
]
Start = Annotated[
    str | None,
    typer.Option(metavar="FILE", help='Weights to go on from, in a third of the steps; "shipped": those that come with '
                 "rlhf-img. With --labels or --policy they learn what else is broken."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from where a run to the same --out stopped.")]
Seed = Annotated[int, typer.Option(help="Of everything; also of which pictures are held out.")]


@app.command("artifact")
def train_artifact(
    out: Annotated[Path, typer.Option(help="The weights to write; their card goes beside them.")] = Path(
        "artifact.safetensors"
    ),
    images: Pictures = None,
    side: Side = 64,
    labels: Labels = None,
    policy: Policy = None,
    policy_images: Annotated[int, typer.Option(min=4, help="With --policy: how many.")] = 256,
    policy_prompts: PolicyPrompts = None,
    judge_url: options.Url = None,
    judge_model: options.Model = None,
    judge_key_env: options.KeyEnv = None,
    appearance: Appearance = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps [default: 6000, with --start 2000]")] = None,
    vae: Vae = None,
    backbone: BackboneName = None,
    start: Start = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Make weights of the artifact reward from a folder of your own pictures, or from the playground's renderer.

    Local defects are put into one of two twins, and both get the same look. With --vae it learns that what an
    autoencoder does to a clean image is no defect either. From the playground it took 78 minutes of a shared core.

    Example: rlhf-img reward train artifact --images photos --out my/artifact.safetensors --resume

    Example: rlhf-img reward train artifact --start shipped --policy runs/first --out my/artifact.safetensors

    Use them with the reward {reward: artifact, options: {weights: my/artifact.safetensors}}.
    """
    from rlhf_img.rewards.artifact_training import AGAIN, ArtifactTraining

    if appearance and images is None:
        raise RlhfImgError("--appearance is for your own pictures: give their folder with --images")
    if policy is None and (policy_prompts or judge_model or judge_url):
        raise RlhfImgError("--policy-prompts and the judge are for images of a policy: give it with --policy")
    if start is not None and backbone is not None:
        raise RlhfImgError("--start goes on with the small network and --backbone begins anew: give one of them")
    default = ArtifactTraining() if start is None else AGAIN
    config = replace(default, seed=seed, steps=steps or default.steps, appearance=appearance)
    source = pictures_of(images, side, seed)
    parts = [_read(file, source.side, config) for file in labels or ()]
    if policy is not None:
        file = _draw(policy, policy_images, policy_prompts, out, seed, (judge_model, judge_url, judge_key_env))
        parts.append(_read(file, source.side, config))
    card = _fit(out, config, source, parts, vae or ("playground" if images is None else "none"), resume, backbone,
                start)
    _draw_curve(card["curve"], out.with_suffix(".png"))
    typer.echo(json.dumps({"labelled": card["labelled"], **card["heldout"]}, indent=2))
    typer.echo(f"Wrote {out}, {out.with_suffix('.json')} and {out.with_suffix('.png')}")


def pictures_of(images: Path | None, side: int, seed: int) -> "Playground | Photographs":
    """The pictures that the options mean, after saying what was read."""
    from rlhf_img.rewards.artifact_pairs import PLAYGROUND
    from rlhf_img.rewards.folder_images import read_folder, summary
    from rlhf_img.rewards.photo_pairs import Photographs, check_side

    if images is None:
        if side != PLAYGROUND.side:
            raise RlhfImgError(f"--side {side} is for your own pictures: give their folder with --images")
        return PLAYGROUND
    check_side(side)
    source = Photographs(folder=read_folder(images, side, seed=seed), side=side)
    typer.echo(f"{len(source.train)} pictures to learn from, {len(source.heldout)} held out to measure on")
    for what, files in (("Converted", source.folder.read_as), ("Skipped", source.folder.skipped)):
        if files:
            typer.echo(f"{what}: {summary(files)}")
    return source


def _read(file: Path, side: int, config: "ArtifactTraining") -> "Labelled":
    from rlhf_img.rewards.artifact_labels import read_labels

    found = read_labels(file, side, config.classes)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(found.counts.items()))
    typer.echo(f"{file}: {len(found.train)} labelled images to learn from, {len(found.heldout)} held out ({listed})")
    return found


def _draw(
    policy: str, count: int, prompts: Path | None, out: Path, seed: int,
    judge: tuple[str | None, str | None, str | None],
) -> Path:  # fmt: skip
    from rich.progress import Progress

    from rlhf_img.training.on_policy import OnPolicy, draw_labelled

    asked = options.open_given(*judge)
    config = OnPolicy(policy=policy, count=count, seed=seed, prompts=None if prompts is None else str(prompts),
                      labeller="residual" if asked is None else asked.id)
    with Progress(transient=True) as bar:
        task = bar.add_task("drawing the policy's images", total=count)
        return draw_labelled(config, out.with_suffix(".policy"), asked,
                             lambda done, total: bar.update(task, completed=done, total=total))


def _fit(
    out: Path, config: "ArtifactTraining", source: "Playground | Photographs", labels: "list[Labelled]", vae: str,
    resume: bool, backbone: str | None, start: str | None,
) -> dict[str, Any]:  # fmt: skip
    from rich.progress import Progress

    from rlhf_img.rewards.artifact_labels import join
    from rlhf_img.rewards.artifact_model import WEIGHTS
    from rlhf_img.rewards.artifact_training import train_artifact as fit

    through = None if vae == "none" else _autoencoder(vae)
    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=config.steps)

        def show(step: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"loss {loss:.3f}")

        return fit(out, config, source=source, labels=join(labels) if labels else None, resume=resume,
                   clean_transform=through, backbone=backbone,
                   weights=WEIGHTS if start == "shipped" else None if start is None else Path(start), progress=show)


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
