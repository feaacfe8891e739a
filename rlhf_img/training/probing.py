"""What hack probes gain from rewards: baseline images, scores before and after, intervals and verdicts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pil
from PIL import ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.captions import caption
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import Scene, break_scene, sample_scene
from rlhf_img.rewards import Images, Reward, apply_gates, score
from rlhf_img.rewards.defects import CLASSES, inject, parts_of
from rlhf_img.rewards.probes import NOISE, PROBES, Image, adversarial_noise
from rlhf_img.training.intervals import interval

Values = npt.NDArray[np.float64]
Outcome = Literal["gains", "holds", "cannot tell"]

_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TILE = 128
"""Longest side in pixels of an image in the picture of all probes."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Images to probe, uint8 (H, W, 3) each, with their prompts. `name` says what kind they are."""

    name: str
    images: list[Image]
    prompts: list[str]


@dataclass(frozen=True, kw_only=True)
class View:
    """A number to watch: one reward, or an objective as the gates leave it. Column `column` of `_Scorer.views`.

    floor: in its own units; a smaller gain is noise. maximised: whether a run with these rewards would maximise it.
    """

    name: str
    column: int
    floor: float
    maximised: bool


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one probe gains of one view on one baseline.

    gain: mean of after minus before, with `low`, `high` (95 %, bootstrap over images) and `n`, the images scored both
    times. before: mean score of these images. share: of these, how many gain more than the floor; None if n is 0.
    """

    view: str
    probe: str
    baseline: str
    before: float | None
    gain: Mapping[str, float | int | None]
    share: float | None
    verdict: Outcome
    maximised: bool


def playground_baselines(count: int, seed: int = 0) -> list[Baseline]:
    """`count` images of each kind: "right", renders that do what their prompts ask; "wrong", with one requirement
    broken; "damaged", with one structural defect. On a right image few rewards have anything to gain."""
    return [_collect(name, make, count, seed) for name, make in
            {"right": _right, "wrong": _wrong, "damaged": _damaged}.items()]


_Make = Callable[[Scene, int, np.random.Generator], tuple[Image, str] | None]
"""From a scene, the number of the image and a random state to the image and its prompt."""


def _collect(name: str, make: _Make, count: int, seed: int) -> Baseline:
    # Scenes have a random state of their own, so that all kinds begin with the same ones.
    scenes, rng = np.random.default_rng((seed, 17)), np.random.default_rng((seed, 16))
    images: list[Image] = []
    prompts: list[str] = []
    while len(images) < count:
        made = make(sample_scene(scenes, "heldout"), len(images), rng)
        if made is not None:
            images.append(made[0])
            prompts.append(made[1])
    return Baseline(name=name, images=images, prompts=prompts)


def _right(scene: Scene, i: int, rng: np.random.Generator) -> tuple[Image, str]:
    return render(scene, i), caption(scene, np.random.default_rng(i))


def _wrong(scene: Scene, i: int, rng: np.random.Generator) -> tuple[Image, str] | None:
    """None where the caption leaves out what was broken: the image is right then."""
    broken, way = break_scene(scene, rng)
    asked = caption(scene, np.random.default_rng(i))
    # A swap leaves the caption of a relation as it is.
    told = way == "relation" or caption(broken, np.random.default_rng(i)) != asked
    return (render(broken, i), asked) if told else None


def _damaged(scene: Scene, i: int, rng: np.random.Generator) -> tuple[Image, str] | None:
    plain = replace(scene, style=None)  # defects are drawn before a style is applied
    name = CLASSES[i % len(CLASSES)]
    broken = inject(name, render(plain), parts_of(plain, name), rng)
    return None if broken is None else (broken, caption(plain, np.random.default_rng(i)))


def read_baseline(folder: Path, count: int) -> Baseline:
    """The first `count` images of a folder with their prompts, of any sizes.

    Prompts come from `samples.json` (as a run writes it beside its samples), `metadata.jsonl` (objects with "file_name"
    and "prompt" or "text") or a .txt file beside each image. Raises RlhfImgError where there are none, or a file
    cannot be read.
    """
    prompts = _prompts_of(folder)
    if not prompts:
        raise RlhfImgError(
            f"{folder} has no images with prompts. Give a folder with samples.json, with metadata.jsonl (lines such as "
            f'{{"file_name": "a.png", "prompt": "a red star"}}), or with a.txt beside a.png'
        )
    chosen = list(prompts.items())[:count]
    return Baseline(name="yours", images=[_read(path) for path, _ in chosen], prompts=[text for _, text in chosen])


def _prompts_of(folder: Path) -> dict[Path, str]:
    try:
        if (folder / "samples.json").is_file():
            rows = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
            return {folder / row["file"]: str(row["prompt"]) for row in rows}
        if (folder / "metadata.jsonl").is_file():
            lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            return {folder / row["file_name"]: str(row.get("prompt") or row["text"]) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RlhfImgError(f"the prompts in {folder} cannot be read: {error!r}") from error
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return {path: path.with_suffix(".txt").read_text(encoding="utf-8").strip()
            for path in files if path.suffix.lower() in _IMAGE_FILES and path.with_suffix(".txt").is_file()}


def _read(path: Path) -> Image:
    try:
        return np.asarray(Pil.open(path).convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise RlhfImgError(f"{path} cannot be read as an image: {error}") from error


def views_of(rewards: Sequence[Reward]) -> list[View]:
    """Every reward, then every objective under the gates if there are any. What a run maximises is the objectives under
    the gates; of gates alone, no run does, and each is taken for itself."""
    names = [reward.name for reward in rewards if reward.is_gate]
    objectives = [k for k, reward in enumerate(rewards) if reward.is_objective]
    gated = bool(names and objectives)
    views = [View(name=r.name, column=k, floor=r.floor, maximised=not gated) for k, r in enumerate(rewards)]
    if gated:
        views += [
            View(name=f"{rewards[k].name} under {' and '.join(names)}", column=len(rewards) + k,
                 floor=rewards[k].floor, maximised=True)
            for k in objectives
        ]  # fmt: skip
    return views


class _Scorer:
    """Rewards asked about images of any sizes: values (B, 2 K), first as they are, then as the gates leave them."""

    def __init__(self, rewards: Sequence[Reward], prompts: Sequence[str]) -> None:
        self.rewards, self.prompts = rewards, prompts

    def __call__(self, images: Sequence[Image]) -> Values:
        raw_BK = torch.full((len(images), len(self.rewards)), torch.nan)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        for places in by_size.values():
            batch = Images.from_pil([Pil.fromarray(images[i]) for i in places])
            asked = [self.prompts[i] for i in places]
            raw_BK[places] = score(self.rewards, asked, batch, group_size=1, max_unscored=1.0).values_BK
        gated_BK = apply_gates(raw_BK[:, None], self.rewards)[0][:, 0]
        return torch.cat([raw_BK, gated_BK], dim=1).double().numpy()

    def only(self, view: View) -> "Callable[[list[Image]], Values]":
        """The view's values (B,), from no more rewards than it needs. Below a gate's threshold, where the objective
        does not move, the gate's own value is the way on."""
        if view.column < len(self.rewards):
            alone = _Scorer([self.rewards[view.column]], self.prompts)
            return lambda images: alone(images)[:, 0]
        gates = [(k, reward) for k, reward in enumerate(self.rewards) if reward.is_gate]

        def fitness(images: list[Image]) -> Values:
            values = self(images)
            short = [np.minimum(values[:, k] - gate.below, 0.0) for k, gate in gates]
            return np.asarray(values[:, view.column] + 0.1 * np.nan_to_num(sum(short)), np.float64)

        return fitness


def probe(
    rewards: Sequence[Reward],
    baselines: Sequence[Baseline],
    *,
    trials: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Scores every baseline before and after every probe. `trials` of the noise's search, for each view of its own;
    0 leaves that probe out. `progress` is called with the parts done and their number."""
    views = views_of(rewards)
    per_baseline = len(PROBES) + (len(views) if trials else 0)
    done, findings = 0, []
    for baseline in baselines:
        scorer = _Scorer(rewards, baseline.prompts)
        before = scorer(baseline.images)
        for name, change in PROBES.items():
            changed = [change(image, text) for image, text in zip(baseline.images, baseline.prompts, strict=True)]
            after = scorer(changed)
            findings += [_finding(view, name, baseline.name, before, after) for view in views]
            progress(done := done + 1, per_baseline * len(baselines))
        for view in views if trials else ():
            rng = np.random.default_rng((seed, 18))
            noisy = adversarial_noise(baseline.images, scorer.only(view), rng, trials=trials)
            # Scored once more: the best of many answers of a judge that is not certain is too good.
            findings.append(_finding(view, NOISE, baseline.name, before, scorer(noisy)))
            progress(done := done + 1, per_baseline * len(baselines))
    return findings


def _finding(view: View, name: str, baseline: str, before_BV: Values, after_BV: Values) -> Finding:
    before, gains = before_BV[:, view.column], after_BV[:, view.column] - before_BV[:, view.column]
    known = ~np.isnan(gains)
    gain = interval(gains)
    return Finding(
        view=view.name, probe=name, baseline=baseline, gain=gain, maximised=view.maximised,
        before=float(before[known].mean()) if known.any() else None,
        share=float((gains[known] > view.floor).mean()) if known.any() else None,
        verdict=verdict(gain, view.floor),
    )  # fmt: skip


def verdict(gain: Mapping[str, Any], floor: float) -> Outcome:
    """"gains" if the interval lies above the floor, "holds" if it lies at or below it."""
    if not gain["n"]:
        return "cannot tell"
    return "gains" if gain["low"] > floor else "holds" if gain["high"] <= floor else "cannot tell"


def overall(findings: Sequence[Finding]) -> list[Finding]:
    """For each view and probe the finding to look at: a probe gains if it gains on one kind of image, and holds if it
    holds on all; among those that say so, the one with the largest gain. In the order of the findings."""
    rank = {"holds": 0, "cannot tell": 1, "gains": 2}
    worst: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.view, finding.probe)
        if key not in worst or _alarm(finding, rank) > _alarm(worst[key], rank):
            worst[key] = finding
    return [worst[key] for key in sorted(worst, key=lambda key: [f.view for f in findings].index(key[0]))]


def _alarm(finding: Finding, rank: Mapping[str, int]) -> tuple[int, float]:
    mean = finding.gain["mean"]
    return rank[finding.verdict], -np.inf if mean is None else mean


def picture(
    rewards: Sequence[Reward], baselines: Sequence[Baseline], *, rows: int = 2, trials: int = 40, seed: int = 0
) -> Pil.Image:
    """The first `rows` images of each baseline, one a row, as they are and after every probe. The noise, of the first
    view that is maximised, is searched for anew."""
    view = next(view for view in views_of(rewards) if view.maximised)
    titles = ["as it is", *PROBES, *([NOISE] if trials else [])]
    lines: list[list[Image]] = []
    for baseline in baselines:
        images, prompts = baseline.images[:rows], baseline.prompts[:rows]
        columns = [images, *([f(i, p) for i, p in zip(images, prompts, strict=True)] for f in PROBES.values())]
        if trials:
            ask = _Scorer(rewards, prompts).only(view)
            columns.append(adversarial_noise(images, ask, np.random.default_rng((seed, 19)), trials=trials))
        lines += [list(line) for line in zip(*columns, strict=True)]
    page = Pil.new("RGB", (len(titles) * (_TILE + 4), 20 + len(lines) * (_TILE + 4)), "silver")
    draw = ImageDraw.Draw(page)
    for x, title in enumerate(titles):
        draw.text((x * (_TILE + 4) + 2, 4), title, fill="black", font=ImageFont.load_default(size=12))
    for y, line in enumerate(lines):
        for x, image in enumerate(line):
            tile = ImageOps.contain(Pil.fromarray(image), (_TILE, _TILE), Pil.Resampling.NEAREST)
            page.paste(tile, (x * (_TILE + 4), 20 + y * (_TILE + 4)))
    return page
