"""`rlhf-img reward train sae`: features of an artifact reward's embeddings, to look at, name and mark."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_img.cli import judge as options
from rlhf_img.cli.train_reward import BackboneName, Pictures, Resume, Seed, Side, pictures_of
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.judges import Judge
    from rlhf_img.rewards.allow_list import Feature
    from rlhf_img.rewards.artifact_model import DefectNet
    from rlhf_img.rewards.artifact_pairs import PairSource
    from rlhf_img.rewards.sae import SparseAutoencoder
    from rlhf_img.rewards.sae_training import SaeTraining

_POOL = 140
"""Pairs of which the contact sheet shows images: clean, damaged and restyled ones."""


def train_sae(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For weights, card, list and sheet.")] = Path("sae"),
    images: Pictures = None,
    side: Side = 64,
    weights: Annotated[
        Path | None, typer.Option(help="The artifact weights whose embeddings it is for [default: the shipped ones].")
    ] = None,
    backbone: BackboneName = None,
    features: Annotated[int, typer.Option(min=2, help="How many features there are.")] = 512,
    k: Annotated[int, typer.Option(min=1, help="How many of them are active in a cell at most.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    shown: Annotated[int, typer.Option(min=1, help="Features on the contact sheet at most, the clearest.")] = 96,
    top: Annotated[int, typer.Option(min=1, help="Images of each on the sheet.")] = 8,
    accept: Annotated[
        bool, typer.Option("--accept", help="Take the proposed marks where nobody has given one.")
    ] = False,
    names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names, one a line, that the judge may give beside its own.")
    ] = None,
    judge_url: options.Url = None,
    judge_model: options.Model = None,
    judge_key_env: options.KeyEnv = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train a sparse autoencoder on an artifact reward's embeddings: features to look at, name and mark.

    Look at FOLDER/features.html, then write names and marks (artifact or style) into FOLDER/features.yaml; a judge can
    name what is on the sheet. With --resume, a finished training only makes card, list and sheet anew; what was
    written by hand stays.

    Example: rlhf-img reward train sae --out sae --images photos --weights my/artifact.safetensors

    Use the list with the reward {reward: artifact, options: {features: sae/features.yaml}}.
    """
    from rlhf_img.config import from_mapping
    from rlhf_img.rewards.sae_features import measure_features, sae_card, write_card
    from rlhf_img.rewards.sae_training import SaeTraining

    vocabulary = _vocabulary(names, judge_model)
    judge = options.open_given(judge_model, judge_url, judge_key_env)
    net = _net(weights, backbone)
    source = pictures_of(images, side, seed)
    config = from_mapping(SaeTraining, {"features": features, "k": k, "steps": steps, "seed": seed}, "reward train sae")
    sae, curve = _fit(out, config, net, source, resume)
    found = measure_features(net, sae, source)
    card = sae_card(net, sae, source, found, config, curve, head=backbone is None)
    write_card(out, card)
    kept = _listed(out, found, accept)
    kept = _shown(out, net, sae, source, kept, (shown, top), judge, vocabulary)
    typer.echo(json.dumps({key: card[key] for key in ("explained_variance", "dead", "separation", "reward")}, indent=2))
    marks = {mark: sum(f.mark == mark for f in kept) for mark in ("artifact", "style")}
    typer.echo(f"{len(kept)} features, {marks['artifact']} marked artifact, {marks['style']} style. Wrote {out}")


def _vocabulary(names: Path | None, judge_model: str | None) -> list[str]:
    """What a judge may call a feature."""
    from rlhf_img.rewards.appearance import STYLES
    from rlhf_img.rewards.defects import CLASSES

    own: list[str] = []
    if names is not None:
        if judge_model is None:
            raise RlhfImgError("--names are for a judge to choose from: give one with --judge-model")
        try:
            own = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise RlhfImgError(f"{names} cannot be read: {error}; give a text file with a name a line") from error
    return list(dict.fromkeys([*CLASSES, *STYLES, *own]))


def _net(weights: Path | None, backbone: str | None) -> "DefectNet":
    """Whose embeddings are taken apart."""
    from rlhf_img.rewards.artifact_model import WEIGHTS, DefectNet, load_detector
    from rlhf_img.rewards.backbones import open_backbone

    if backbone is None:
        return load_detector(weights or WEIGHTS).net
    if weights is not None:
        raise RlhfImgError("give --weights or --backbone: weights on a backbone have the backbone's embeddings")
    return DefectNet(open_backbone(backbone)).eval()


def _fit(
    out: Path, config: "SaeTraining", net: "DefectNet", source: "PairSource", resume: bool
) -> "tuple[SparseAutoencoder, list[dict[str, float]]]":
    from rich.progress import Progress

    from rlhf_img.rewards.sae_training import train_sae as fit

    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=config.steps)

        def show(step: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"loss {loss:.3f}")

        return fit(out, config, net, source, resume=resume, progress=show)


def _listed(out: Path, found: "list[Feature]", accept: bool) -> "list[Feature]":
    """The features as measured, with what was written into an older list by hand, and the proposals if accepted."""
    from rlhf_img.rewards.allow_list import LIST_FILE, kept_by_hand, read_list

    file = out / LIST_FILE
    kept = kept_by_hand(read_list(file), found) if file.is_file() else found
    return [replace(f, mark=f.mark or f.proposed) for f in kept] if accept else list(kept)


def _shown(
    out: Path, net: "DefectNet", sae: "SparseAutoencoder", source: "PairSource", features: "list[Feature]",
    counts: tuple[int, int], judge: "Judge | None", vocabulary: list[str],
) -> "list[Feature]":  # fmt: skip
    """Writes list and sheet, after a judge has named what is on the sheet without a name; gives the features back."""
    from rlhf_img.report.features import FeatureView, build_sheet
    from rlhf_img.rewards import allow_list
    from rlhf_img.rewards.heat import overlay
    from rlhf_img.rewards.sae_features import name_features, pool_of, top_images

    pool = pool_of(source, _POOL)
    pixels = list(pool.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
    tops = top_images(net, sae, pool, [f.id for f in features[: counts[0]]], counts[1])
    if judge is not None:
        unnamed = {f.id: tops[f.id] for f in features[: counts[0]] if f.name is None}
        called = name_features(judge, pixels, unnamed, vocabulary)
        features = [replace(f, name=f.name or called.get(f.id)) for f in features]
    file = out / allow_list.LIST_FILE
    allow_list.write_list(file, allow_list.FeatureList(
        sae=allow_list.digest_of(out / allow_list.SAE_FILE), features=tuple(features),
        unmarked=allow_list.read_list(file).unmarked if file.is_file() else "keep",
    ))  # fmt: skip
    views = [FeatureView(f.id, f.name, f.mark, f.proposed,
                         f"defects {f.defect_auc:.2f}, {f.style} {f.style_auc:.2f}",
                         tuple(overlay(pixels[t.place], t.heat_hw) for t in tops[f.id]))
             for f in features[: counts[0]]]
    build_sheet(views, "Features", [
        f"The {len(views)} clearest of {len(features)} features; in red, where. Figures: how often a damaged "
        "image has more of the feature than a clean one, and an image in a style more than without; 0.5 is chance.",
        f"Write names and marks into {allow_list.LIST_FILE}.",
    ], out / allow_list.SHEET_FILE)  # fmt: skip
    return features
