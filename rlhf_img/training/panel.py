"""A small validation panel that is looked at while a run goes on, and tells when it was best and when to stop."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.rewards import Reward
from rlhf_img.training import distributed
from rlhf_img.training.evaluate import EVAL_SEED, EvalConfig
from rlhf_img.training.likeness import colours
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.samples import Drawn, draw_together
from rlhf_img.training.tensors import read_tensors, write_tensors

SCORE = "panel/score"
_AVERAGE = "average"


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelConfig:
    """When to look, and how long to wait for something better."""

    every: int = 25
    """Iterations between two looks; 0: none, and the last weights are kept."""
    prompts: int = 64
    """Training prompts that are set aside for it, at most a fifth; one image each."""
    patience: int = 3
    """Looks in a row without a better score after which the run ends; 0: it goes on to the end."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        if min(self.every, self.patience) < 0 or self.prompts < 1:
            raise RlhfImgError("panel.every and panel.patience must be 0 or more, and panel.prompts 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """What is looked at. Its prompts are no held-out ones, so that choosing by it does not touch what is reported."""

    config: PanelConfig
    model: Model
    conditioner: Conditioner
    policy: Policy
    rewards: Sequence[Reward]
    prompts: Sequence[Prompt]
    settings: EvalConfig
    at_most: Callable[[], Mapping[str, float]] = dict
    """Of a reward the most that counts: a student that gives up one thing for more of another than its teacher has is
    no better for it."""
    begins: int = 0
    """The iteration after which it looks first. While a rate is still high, the best look is a matter of chance."""

    def look(self) -> dict[str, float]:
        """Measures the averaged weights: `panel/score`, the mean over rewards of their place in their range, each
        reward's mean, and the mean saturation. NaN where nothing could be scored."""
        with self.policy.averaged():
            drawn = self.draw(self.model, self.settings.num_steps, self.settings.guidance)
        means, limits = means_of(drawn), self.at_most()
        counted = {name: min(mean, limits.get(name, math.inf)) for name, mean in means.items()}
        places = [_place(counted[reward.name], reward.range) for reward in self.rewards]
        return {
            SCORE: float(np.mean(places)), **{f"panel/{name}": value for name, value in means.items()},
            "panel/saturation": float(np.mean(colours(drawn.images.tensor)["saturation"])),
        }  # fmt: skip

    def is_due(self, step: int, last: int) -> bool:
        """Whether to look after iteration `step` of `last`."""
        return step in (self.begins, last) or (step > self.begins and step % self.config.every == 0)

    def draw(self, model: Model, num_steps: int, guidance: float) -> Drawn:
        """The panel's prompts from its seeds by `model` as it is now, scored."""
        seeds = [3 * EVAL_SEED + i for i in range(len(self.prompts))]
        return draw_together(
            model, self.conditioner, self.rewards, self.prompts, seeds, num_steps=num_steps, guidance=guidance
        )


def means_of(drawn: Drawn) -> dict[str, float]:
    """Each reward's mean over what was scored; NaN where nothing was."""
    values = {name: drawn.scores.values_BK[:, k].numpy() for k, name in enumerate(drawn.scores.names)}
    known = {name: v[~np.isnan(v)] for name, v in values.items()}
    return {name: float(v.mean()) if v.size else math.nan for name, v in known.items()}


def _place(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return (value - low) / (high - low) if math.isfinite(high - low) else value


class Best:
    """The best weights of a run so far, by its panel, kept in the run's folder; a resumed run goes on with them."""

    def __init__(self, panel: Panel | None, run: RunDir, rows: Sequence[Mapping[str, float | None]]) -> None:
        """`rows`: the lines of metrics.jsonl up to where the run goes on."""
        self._panel, self._run = panel, run
        self._seen = [(int(row["step"] or 0), row[SCORE]) for row in rows if SCORE in row]

    def look(self, step: int, last: int) -> dict[str, float]:
        """The panel's metrics if one is due after iteration `step` of `last`; better weights are kept."""
        panel = self._panel
        if panel is None or not panel.config.every or not panel.is_due(step, last):
            return {}
        metrics = panel.look()
        before = self.score
        self._seen.append((step, metrics[SCORE]))
        if metrics[SCORE] > before:  # NaN is not better than anything
            self._run.save_best(lambda folder: write_tensors(folder, _AVERAGE, panel.policy.average))
        return metrics

    @property
    def score(self) -> float:
        return max((score for _, score in self._known()), default=-math.inf)

    @property
    def step(self) -> int | None:
        """The iteration whose weights are the best; None if no panel was scored."""
        return next((step for step, score in self._known() if score == self.score), None)

    @property
    def exhausted(self) -> bool:
        """Whether the panel has not risen for too long."""
        if self._panel is None or not self._panel.config.patience or self.step is None:
            return False
        return sum(step > self.step for step, _ in self._seen) >= self._panel.config.patience

    def restore(self) -> None:
        """Makes the best weights the averaged ones, which are measured and exported."""
        if self._panel is not None and self.step is not None:
            distributed.gather(None)  # the first process may still be writing them
            read_average(self._run.path / "best", self._panel.policy)

    def _known(self) -> list[tuple[int, float]]:
        return [(step, score) for step, score in self._seen if score is not None and not math.isnan(score)]


def read_average(folder: Path, policy: Policy) -> None:
    """The averaged weights of a policy from a folder. Raises RlhfImgError if they cannot be read."""
    try:
        read_tensors(folder, _AVERAGE, policy.average)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RlhfImgError(f"{folder} cannot be read ({error}): start the run again with another --out") from error
