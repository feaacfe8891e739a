"""A policy's own images with labels of what is broken in them, so that an artifact reward learns the policy's faults.

The labels are the playground's residual, which is exact, or a judge's verdict. They are written as the CSV that
`rewards.artifact_labels` reads, and may be corrected by hand. What has been trained on the residual is no longer
measured by it: another policy's residual is, a little, what this one's reward has learnt to please.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import Ask, Judge
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.playground.scene import SIZE
from rlhf_img.rewards import Images
from rlhf_img.rewards.artifact_labels import BROKEN, CLEAN, COLUMNS
from rlhf_img.rewards.residual import fit_clean
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.export import open_trained
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.samples import draw_images

Image = npt.NDArray[np.uint8]
Marks = list[tuple[str | float, ...]]
"""Rows of one image without its name: a class, and perhaps a box in pixels."""
Labeller = Callable[[Sequence[Image]], list[Marks]]

QUESTION = (
    "Is anything in this image broken: a thing torn, fused with another, bent, doubled or with a hole, a garbled "
    "letter, a seam, stray dots? Blur, grain, dark corners and other looks do not count."
)
_SURE = 0.7
"""P(yes) from which a judge is believed that something is broken; from 1 - this, that nothing is."""
_CLEAN_PX, _BROKEN_PX = 4, 16
"""Unexplained pixels up to which an image is clean, and from which it is broken. Between, it is left out."""
_SHARD = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class OnPolicy:
    """What is drawn; kept beside the images, so that it can go on later."""

    policy: str
    """A model or a run, see `open_trained`."""
    prompts: str | None = None
    """File of prompts; None: the playground's training prompts."""
    count: int = 256
    """Images, one a prompt; prompts are repeated if there are fewer."""
    num_steps: int = 16
    guidance: float = 0.0
    labeller: str = "residual"
    """Who labels: "residual", or a judge's id."""
    seed: int = 0


def draw_labelled(
    config: OnPolicy, out: Path, judge: Judge | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Draws and labels images; `out`/labels.csv and the images beside it. What is there already stays.

    judge: who labels instead of the residual. Raises RlhfImgError if `out` holds images of other settings, or the
    residual is to label what is no image of the playground.
    """
    _keep_settings(config, out)
    starts = range(0, config.count, _SHARD)
    files = [out / f"labels-{start // _SHARD:05d}.csv" for start in starts]
    left = [(start, file) for start, file in zip(starts, files, strict=True) if not file.exists()]
    if left:
        asked = _prompts(config)
        model = open_trained(config.policy)
        if judge is None and model.default_size != SIZE:
            raise RlhfImgError(
                f"{config.policy} draws {model.default_size} px, and without a judge only images of the playground "
                f"({SIZE} px) can be labelled; give --judge-model"
            )
        conditioner = Conditioner(model)
        for start, file in left:
            some = [asked[i % len(asked)] for i in range(start, min(config.count, start + _SHARD))]
            seeds = [config.seed * 1_000_003 + start + i for i in range(len(some))]
            drawn = Images(draw_images(
                model, conditioner, some, seeds, num_steps=config.num_steps, guidance=config.guidance
            ))  # fmt: skip
            rows: Marks = []
            seen = list(drawn.arrays)
            for i, marks in enumerate(by_residual(seen) if judge is None else by_judge(judge, seen)):
                if marks:
                    drawn[i].save(out / (name := f"{start + i:06d}.png"))
                    rows += [(name, *mark) for mark in marks]
            _write(file, rows)
            progress(start + len(some), config.count)
    everything = [row for file in files for row in csv.reader(file.read_text().splitlines()[1:])]
    _write(out / "labels.csv", [tuple(row) for row in everything])
    return out / "labels.csv"


def by_residual(images: Sequence[Image]) -> list[Marks]:
    """Labels by what the playground's best clean render cannot explain: boxes without a class; [] if unsure."""
    found: list[Marks] = []
    for image in images:
        spots = fit_clean(image).unexplained_HW
        if _CLEAN_PX < spots.sum() < _BROKEN_PX:
            found.append([])
            continue
        # Spots with a gap of up to two pixels are one.
        joined, _ = ndimage.label(ndimage.binary_dilation(spots, np.ones((3, 3))))
        boxes = [(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
                 for k, (rows, columns) in enumerate(ndimage.find_objects(joined), start=1)
                 if spots[joined == k].sum() >= _CLEAN_PX]
        found.append([(BROKEN, *box) for box in boxes] if spots.sum() >= _BROKEN_PX and boxes else [(CLEAN,)])
    return found


def by_judge(judge: Judge, images: Sequence[Image]) -> list[Marks]:
    """Labels by a judge, without a place; [] where it could not tell. Raises what `Judge.ask` raises."""
    answers = judge.ask([Ask(image=image, question=QUESTION) for image in images])
    sure: dict[bool, Marks] = {True: [(BROKEN,)], False: [(CLEAN,)]}
    return [[] if a.p_yes is None or 1 - _SURE < a.p_yes < _SURE else sure[a.p_yes >= _SURE] for a in answers]


def _prompts(config: OnPolicy) -> list[Prompt]:
    if config.prompts is not None:
        return prompt_room.read_prompts(Path(config.prompts))
    return prompt_room.from_playground("train", config.count)


def _keep_settings(config: OnPolicy, out: Path) -> None:
    file = out / "on-policy.json"
    mapping = asdict(config)
    if file.is_file():
        before = json.loads(file.read_text())
        if changed := [key for key, value in mapping.items() if before.get(key) != value]:
            raise RlhfImgError(f"{out} holds images drawn with another {', '.join(changed)}; move it away, or give "
                               f"what it was made with: {before}")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mapping, indent=1))
    except OSError as error:
        raise RlhfImgError(f"{out} cannot be written: {error.strerror}; give another --out") from error


def _write(file: Path, rows: Marks) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    file.with_suffix(".part").write_text(text.getvalue())
    os.replace(file.with_suffix(".part"), file)
