"""The report card of a distillation: the student beside what it is made from, on the same prompts and seeds."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from rlhf_img.model.loading import Model
from rlhf_img.model.lora import role
from rlhf_img.model.sampling import sample
from rlhf_img.rewards import Images
from rlhf_img.training.evaluate import EVAL_SEED, EvalConfig, Evaluation, compare, summarise
from rlhf_img.training.intervals import interval, ratio_interval
from rlhf_img.training.likeness import Features, colours, energy_distance
from rlhf_img.training.loop import Job, measured
from rlhf_img.training.pairs import encode_image
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.samples import Drawn
from rlhf_img.training.sentinels import distance

_TILE = 128
"""Longest side, in pixels, of an image in card.png."""
_TIMED = 16
"""Images whose sampling is timed; a quarter of them are drawn once before the clock starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A way to draw images that the student is held against."""

    name: str
    model: Model
    role: str | None
    num_steps: int
    guidance: float


def controls(raw: Model, teacher: str | None, student_steps: int, full_steps: int, guidance: float) -> list[Control]:
    """The teacher guided at full steps, guided and unguided at the student's, and the model before alignment.

    Each is sampled at the noise levels of `raw`, which it was trained for. Those that coincide are there once.
    """
    wanted = [
        ("teacher", teacher, full_steps, guidance), ("teacher", teacher, student_steps, guidance),
        ("teacher", teacher, student_steps, 0.0), ("raw", None, full_steps, guidance),
    ]  # fmt: skip
    found: dict[tuple[str | None, int, float], Control] = {}
    for name, role_name, steps, g in wanted:
        title = f"{name}, {steps} steps, {f'g = {g:g}' if g else 'no guidance'}"
        found.setdefault((role_name, steps, g), Control(
            name=title, model=raw, role=role_name, num_steps=steps, guidance=g
        ))  # fmt: skip
    return list(found.values())


def report_card(
    job: Job, run: RunDir, against: Sequence[Control], features: Features | None, drawn: Drawn, after: Evaluation,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """What card.json holds: `rows`, the student first, each with its scores, colours, calls of the network, seconds an
    image, on CUDA the bytes that sampling takes, and the `distance` of its images' law from that of the first control;

    for a control also `student_minus`, the paired difference, and `agreement`: 1 - distance to the student's image of
    the same prompt and seed / distance between two of the control's images of a prompt. `kept` is the student's pass
    rate over that of the first control; `gain_kept` the share of its gain over the last, where that is another model.
    `memory` is the most bytes that the process has held. Writes card.png: a line a prompt, a column a row of the card,
    from the same noise.
    """
    settings = job.config.eval
    student = Control(
        name=f"student, {settings.num_steps} steps, no guidance", model=job.model, role=job.policy.name,
        num_steps=settings.num_steps, guidance=0.0,
    )  # fmt: skip
    with job.policy.averaged():
        rows = [_row(job, student, after, drawn)]
    seen, pictures = [], [drawn.images]
    for control in against:
        config = EvalConfig(
            prompts=settings.prompts, num_steps=control.num_steps, guidance=control.guidance,
            diversity_prompts=settings.diversity_prompts, diversity_images=settings.diversity_images,
        )  # fmt: skip
        with role(control.model.transformer, control.role):
            evaluation, images = measured(job, console, "measuring controls", model=control.model, settings=config)
            row = _row(job, control, evaluation, images)
        apart = distance(drawn.images.tensor, images.images.tensor).numpy()
        scale = float(np.mean(evaluation.diversity))
        row["agreement"] = interval(1 - apart / scale if scale > 0 else np.full_like(apart, np.nan))
        row["student_minus"] = compare(evaluation, after)
        rows.append(row)
        seen.append(evaluation)
        pictures.append(images.images)
    if features is not None:
        law = [features(images.tensor) for images in pictures]
        for i in (i for i in range(len(rows)) if i != 1):
            rows[i]["distance"] = energy_distance(law[i], law[1])
    run.write_image("card.png", grid(pictures, job.config.samples))
    teacher, last = np.array(seen[0].pass_all), np.array(seen[-1].pass_all)
    passed = np.array(after.pass_all)
    raw = against[-1].role != against[0].role
    return {
        "rows": rows,
        "kept": _ratio(passed, teacher),
        "gain_kept": _ratio(passed - last, teacher - last) if raw else None,
        "teacher_gain": interval(teacher - last) if raw else None,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _ratio(top: np.ndarray, bottom: np.ndarray) -> dict[str, float | int | None]:
    known = ~(np.isnan(top) | np.isnan(bottom))
    return ratio_interval(top[known], bottom[known])


def grid(columns: Sequence[Images], count: int) -> bytes:
    """A PNG of the first `count` images of each column, side by side, at most 128 px each."""
    height, width = columns[0].tensor.shape[-2:]
    size = (min(width, _TILE), min(height, _TILE))
    sheet = Image.new("RGB", (len(columns) * (size[0] + 2), count * (size[1] + 2)), "white")
    for x, images in enumerate(columns):
        for y, image in enumerate(images[:count]):
            sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (x * (size[0] + 2), y * (size[1] + 2)))
    return encode_image(sheet)


def _row(job: Job, control: Control, evaluation: Evaluation, drawn: Drawn) -> dict[str, Any]:
    calls = control.num_steps * (2 if control.guidance > 0 else 1)
    cuda = control.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    return {
        **summarise(control.name, evaluation), "num_steps": control.num_steps, "guidance": control.guidance,
        "colours": {name: interval(values) for name, values in colours(drawn.images.tensor).items()},
        "calls": calls, "seconds": _seconds_an_image(job, control),
        "memory": torch.cuda.max_memory_allocated() if cuda else None,
    }  # fmt: skip


def _seconds_an_image(job: Job, control: Control) -> float:
    prompts = [p.text for p in job.heldout_prompts[:1]] * _TIMED
    began = 0.0
    for count in (_TIMED // 4, _TIMED):
        began = time.perf_counter()
        latents = sample(
            control.model, job.conditioner, prompts[:count], range(EVAL_SEED, EVAL_SEED + count),
            num_steps=control.num_steps, guidance=control.guidance,
        )  # fmt: skip
        float(latents.sum())  # waits for the device
    return (time.perf_counter() - began) / _TIMED
