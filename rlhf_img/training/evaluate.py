"""Held-out evaluation: the same prompts and seeds before and after, with bootstrap intervals over prompts."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model
from rlhf_img.rewards import Reward
from rlhf_img.training import distributed
from rlhf_img.training.intervals import as_array, interval, ratio_interval
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.samples import Drawn, Progress, draw, draw_images, merge
from rlhf_img.training.sentinels import LEAST_GAIN, diversity, high_frequency_energy

EVAL_SEED = 7_000_000
"""First image seed of evaluations; far from those of rollouts, and the same for every run, so that runs compare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What is measured before and after training."""

    prompts: int = 256
    """Held-out prompts, one image each."""
    num_steps: int = 16
    """Denoising steps."""
    guidance: float = 0.0
    """Krea's g; 0 = off."""
    diversity_prompts: int = 32
    """Of these, so many are drawn `diversity_images` times to measure the variety within a prompt."""
    diversity_images: int = 6
    rewards: str | tuple[dict[str, object], ...] | None = None
    """More rewards that measure and do not train, as in the run's `rewards`: a judge that the policy has not met."""
    heldout_share: float = 0.1
    """Share of a prompts file that is held out when no evaluation prompts are given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One checkpoint's measurements by held-out prompt, as JSON holds them; null is not known."""

    rewards: dict[str, list[float]]
    """Name -> value of each prompt's image."""
    pass_all: list[float]
    """1 where all of a prompt's requirements are met, 0 where not."""
    pass_requirement: list[float]
    """Share of a prompt's scored requirements that are met."""
    by_check: dict[str, list[float]]
    """Kind of check -> 1 or 0 for each scored requirement of that kind."""
    diversity: list[float]
    """Mean distance between images of a prompt, for the first prompts."""
    high_freq: list[float] = field(default_factory=list)
    """Energy in the finest detail of each prompt's image; empty in what older versions wrote."""


def evaluate(
    model: Model, conditioner: Conditioner, rewards: Sequence[Reward], prompts: Sequence[Prompt], config: EvalConfig,
    progress: Progress | None = None, shown: int | None = None,
) -> tuple[Evaluation, Drawn]:  # fmt: skip
    """Measures the transformer as it is now (with the role that is active). `rewards` must hold "rubric".

    Of the images the first `shown` are given back, or all. Several processes share the work.
    """
    shown = len(prompts) if shown is None else shown
    mine = distributed.share(len(prompts))
    drawn = draw(
        model, conditioner, rewards, [prompts[i] for i in mine], [EVAL_SEED + i for i in mine],
        num_steps=config.num_steps, guidance=config.guidance, progress=progress,
    )  # fmt: skip
    parts = distributed.gather(drawn.with_images(sum(i < shown for i in mine)))
    each = config.diversity_images
    diverse = min(len(prompts), config.diversity_prompts)
    places = distributed.share(diverse)
    varied = draw_images(
        model, conditioner, [prompts[i] for i in places for _ in range(each)],
        [2 * EVAL_SEED + i * each + k for i in places for k in range(each)], num_steps=config.num_steps,
        guidance=config.guidance,
    )  # fmt: skip
    spread = distributed.gather_shares(diversity(varied.unflatten(0, (-1, each))), diverse)
    detail = distributed.gather_shares(high_frequency_energy(drawn.images.tensor), len(prompts))
    whole = merge(parts)
    return measure(whole, spread.tolist(), detail.tolist()), whole


def measure(drawn: Drawn, diversity_P: list[float], high_freq_B: list[float]) -> Evaluation:
    """What is kept of an evaluation's images."""
    by_check: dict[str, list[float]] = {}
    shares = []
    for result in drawn.rubric_results():
        passed = {r.id: (r.check, float(r.passed)) for r in result.requirements if r.passed is not None}
        for check, value in passed.values():
            by_check.setdefault(check, []).append(value)
        shares.append(float(np.mean([value for _, value in passed.values()])) if passed else math.nan)
    values = drawn.scores.values_BK
    return Evaluation(
        rewards={name: values[:, k].tolist() for k, name in enumerate(drawn.scores.names)},
        pass_all=[math.nan if r.passed is None else float(r.passed) for r in drawn.rubric_results()],
        pass_requirement=shares,
        by_check=by_check,
        diversity=diversity_P,
        high_freq=high_freq_B,
    )


def summarise(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """One entry of eval.json's `checkpoints`."""
    return {
        "name": name,
        "pass_all": interval(evaluation.pass_all),
        "pass_requirement": interval(evaluation.pass_requirement),
        "by_check": {check: interval(passed) for check, passed in sorted(evaluation.by_check.items())},
        "rewards": {reward: interval(values) for reward, values in evaluation.rewards.items()},
        "unscored": {reward: int(np.isnan(as_array(values)).sum()) for reward, values in evaluation.rewards.items()},
        "diversity": interval(evaluation.diversity),
        "high_freq": interval(evaluation.high_freq),
    }


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """eval.json's `difference`: after minus before, paired by prompt; for diversity and fine detail, their ratio."""
    return {
        "pass_all": interval(as_array(after.pass_all) - as_array(before.pass_all)),
        "pass_requirement": interval(as_array(after.pass_requirement) - as_array(before.pass_requirement)),
        "rewards": {
            name: interval(as_array(values) - as_array(before.rewards[name])) for name, values in after.rewards.items()
        },
        "diversity_ratio": ratio_interval(as_array(after.diversity), as_array(before.diversity)),
        **_high_freq_ratio(before, after),
    }


def transfer_ratios(
    before: Evaluation, after: Evaluation, trained_on: Sequence[str], held_out: Sequence[str], resamples: int = 2000
) -> dict[str, Any] | None:
    """Whether the gain is real: that of each held-out reward over the mean one of the rewards trained on, both in
    spreads of the images before; with 95 % bootstrap intervals over prompts. None if nothing was trained on.

    Where the trained rewards have gained less than 0.2 spreads there is no ratio (null).
    """
    if not trained_on:
        return None
    old, new = ({name: as_array(values) for name, values in e.rewards.items()} for e in (before, after))
    rows = np.random.default_rng(0).integers(len(before.pass_all), size=(resamples, len(before.pass_all)))
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample in which nothing is scored is NaN
        gains = {
            name: np.append(np.nanmean((new[name] - old[name])[rows], 1), np.nanmean(new[name] - old[name]))
            / np.nanstd(old[name])
            for name in old
        }
        trained = np.mean([gains[name] for name in trained_on], 0)
        ratios = {name: gains[name] / trained for name in held_out}
    enough = bool(trained[-1] >= LEAST_GAIN)
    return {
        "trained_on": list(trained_on), "gain": _percentiles(trained),
        "ratios": {name: _percentiles(ratio) if enough else None for name, ratio in ratios.items()},
    }  # fmt: skip


def _percentiles(samples: np.ndarray) -> dict[str, float] | None:
    """Of resamples, the last of which is the value itself; None if it is not known."""
    if not np.isfinite(samples[-1]):
        return None
    low, high = np.nanpercentile(samples[:-1], [2.5, 97.5])
    return {"mean": float(samples[-1]), "low": float(low), "high": float(high)}


def _high_freq_ratio(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    if len(before.high_freq) != len(after.high_freq):
        return {}
    return {"high_freq_ratio": ratio_interval(as_array(after.high_freq), as_array(before.high_freq))}
