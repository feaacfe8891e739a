"""Watches a run with the sentinels: the same prompts and seeds again and again, each held against what Raw drew.

Raw is the policy before training. Where a sentinel stands is its `place`: the share of Raw's values that lie below one
of the policy's, 0.5 where nothing has changed. One band in places serves every statistic, whatever its units and
however its values are distributed, and needs no spread that an outlier could widen.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlhf_img.errors import RlhfImgError, RunStopped, did_you_mean
from rlhf_img.rewards import Images, Reward, score
from rlhf_img.training import distributed
from rlhf_img.training.evaluate import EVAL_SEED
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.rundir import Checkpoint, RunDir
from rlhf_img.training.sentinels import (
    chance,
    distance,
    diversity,
    emptied,
    image_statistics,
    place,
    stray_characters,
    transfer,
)

FILE = "sentinels.json"
OUT = "sentinel/out"
STATISTICS = (
    "saturation", "dark_share", "edge_density", "colour_entropy", "grid", "high_freq", "jpeg", "characters",
    "diversity", "drift", "emptied",
)  # fmt: skip
REWARD = "reward/"
"""Prefix of the sentinels that are held-out rewards."""
_SIDES = {"grid": "above", "characters": "above", "drift": "above", "emptied": "above", "diversity": "below"}
"""Sentinels of which only one side of the band is a bad sign. Held-out rewards too: they must not fall."""
_ERRORS = 4
"""Standard errors by which the band is at least wide, so that a small panel does not warn by chance."""
_CHANGED = 0.3
"""Share of images that a sound run may change in either direction; by such chance `emptied` must not leave its band."""
_PAIRED_ERRORS = 3
"""The same as `_ERRORS` for `emptied`, which has no other band."""
_COLOURS = ("saturation", "colour_entropy")
_COLOURS_PART = 0.75
"""Of the band of the others: in 17 sound runs colours moved by 0.117 at most, `jpeg` and `high_freq` up to 0.166."""
_LEAST_GAIN = 0.5
"""Spreads by which the trained rewards must have risen before the transfer is judged."""

Draw = Callable[[Sequence[Prompt], Sequence[int]], Tensor]
"""Prompts and seeds -> images (B, 3, H, W) in [0, 1], on the CPU."""
Limits = tuple[float | None, float | None]
"""The lowest and the highest place that is allowed; None: any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SentinelConfig:
    """What the images of a run are watched for, and when it must not go on."""

    every: int = 10
    """Iterations between two looks, besides one at each checkpoint; 0: none."""
    prompts: int = 32
    """Held-out prompts that are drawn at each look."""
    images: int = 2
    """Of each prompt, always from the same seeds."""
    num_steps: int | None = None
    """Denoising steps; null: those of the evaluation, at most 8."""
    characters: bool = True
    """Read the first image of each prompt for characters that it does not ask for."""
    warn: float = 0.7
    """A sentinel is outside of its band where this share of Raw's values lies on one side of the policy's. That of
    colours is three quarters as wide, 0.65 for 0.7. Every band is at least four standard errors wide."""
    stop: float | None = 0.95
    """The same for stopping the run, with exit code 3; null: never."""
    warn_only: tuple[str, ...] = ()
    """Sentinels that never stop the run."""
    off: tuple[str, ...] = ()
    """Sentinels that are not watched, because they are meant to move: a reward for neon moves `saturation`."""
    min_transfer: float | None = 0.2
    """Warn where a held-out reward gains less than this share of what the trained rewards gain, both in spreads of Raw;
    null: never."""
    max_kl: float | None = None
    """The run stops if the metric `kl`, the distance from its reference, exceeds this; null: never."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range and sentinels that do not exist."""
        if self.every < 0 or self.prompts < 1 or self.images < 2:
            raise RlhfImgError("sentinels.every must be 0 or more, sentinels.prompts 1, and sentinels.images 2")
        for name, value in (("warn", self.warn), ("stop", self.stop)):
            if value is not None and not 0.5 < value < 1:
                raise RlhfImgError(f"sentinels.{name} is a share above 0.5 and below 1; got {value}")
        for name in (*self.off, *self.warn_only):
            if name not in STATISTICS and not name.startswith(REWARD):
                raise RlhfImgError(f'there is no sentinel "{name}"; {did_you_mean(name, STATISTICS)}, {REWARD}NAME')


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Where a sentinel may stand, in places."""

    warn: Limits
    stop: Limits

    def left(self, place: float) -> bool:
        return _outside(place, self.warn)

    def far(self, place: float) -> bool:
        return _outside(place, self.stop)


def _outside(place: float, limits: Limits) -> bool:
    low, high = limits
    return (low is not None and place < low) or (high is not None and place > high)  # NaN is nowhere


def band(config: SentinelConfig, name: str, now: int, raw: int) -> Band:
    """Of the sentinel `name`, with so many values now and of Raw."""
    side = "below" if name.startswith(REWARD) else _SIDES.get(name)
    if name == "emptied":
        width = _PAIRED_ERRORS * (_CHANGED / now) ** 0.5 / 2
    else:
        part = _COLOURS_PART if name in _COLOURS else 1.0
        width = max(part * (config.warn - 0.5), _ERRORS * chance(now, raw))

    def limits(width: float) -> Limits:
        return None if side == "above" else 0.5 - width, None if side == "below" else 0.5 + width

    if config.stop is None or name in config.warn_only:
        return Band(warn=limits(width), stop=(None, None))
    return Band(warn=limits(width), stop=limits(max(width, config.stop - 0.5)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """What is watched, and how its images come about."""

    config: SentinelConfig
    prompts: Sequence[Prompt]
    """The panel: so many of the held-out prompts."""
    rewards: Sequence[Reward]
    trained_on: Sequence[str]
    """Names of the rewards that the policy maximises."""
    held_out: Sequence[str]
    """Names of those that only measure. A gate, which caps the others, is neither."""
    period: int
    """Pixels between two tokens."""
    draw: Draw
    """As the policy is now."""
    draw_raw: Draw
    """As it was before training, or whatever else it is held against."""

    def look(
        self, draw: Draw, raw: tuple[Mapping[str, Tensor], Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values of every sentinel and reward, and small images (B, 3, 8, 8).

        `raw`: what this returned of Raw; None: this is Raw.
        """
        each, mine = self.config.images, distributed.share(len(self.prompts))
        prompts = [self.prompts[i] for i in mine for _ in range(each)]
        images = Images(draw(prompts, [4 * EVAL_SEED + i * each + k for i in mine for k in range(each)]))
        scores = score(
            self.rewards, [p.text for p in prompts], images, {"rubrics": [p.rubric for p in prompts]},
            group_size=each, max_unscored=1.0,
        )  # fmt: skip
        groups = images.tensor.float().unflatten(0, (len(mine), each))
        seen = image_statistics(images, self.period) | {"diversity": diversity(groups)}
        seen |= {REWARD + name: scores.values_BK[:, k] for k, name in enumerate(scores.names)}
        if self.config.characters:
            seen["characters"] = stray_characters(Images(groups[:, 0]), prompts[::each])
        seen = {name: self._gathered(values, len(mine)).double() for name, values in seen.items()}
        # at 8 bits, as the file holds them, so that a resumed run compares with the same
        small = self._gathered(adaptive_avg_pool2d(images.tensor.float(), 8), len(mine)).mul(255).round() / 255
        # of Raw: how far apart two seeds of a prompt are
        seen["drift"] = seen["diversity"] if raw is None else distance(small, raw[1]).double()
        seen["emptied"] = torch.zeros_like(seen["jpeg"])
        if raw is not None and "jpeg" in raw[0]:
            seen["emptied"] = emptied(seen["jpeg"], raw[0]["jpeg"])
        return {name: values for name, values in seen.items() if name not in self.config.off}, small

    def _gathered(self, values: Tensor, prompts: int) -> Tensor:
        """Of all processes, in the order of the prompts."""
        return distributed.gather_shares(values.unflatten(0, (prompts, -1))).flatten(0, 1)


class Watch:
    """A run's sentinels: what Raw drew, where each stands now, and whether the run may go on."""

    def __init__(self, watched: Watched, run: RunDir, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Measures Raw, or reads what the first part of a resumed run measured.

        `rows`: the lines of metrics.jsonl up to where the run goes on.
        Raises RlhfImgError if a resumed run would look at other images than before.
        """
        self._watched, self._run, size = watched, run, (len(watched.prompts), watched.config.images)
        self._inside = {int(row["step"] or 0) for row in rows if row.get(OUT) == 0}
        file = run.path / FILE
        if distributed.gather(file.exists())[0]:
            found = json.loads(file.read_text())
            if (found["prompts"], found["images"]) != size:
                raise RlhfImgError(
                    f"Raw was watched on {found['prompts']} prompts x {found['images']} images, and the run would go "
                    f"on with {size[0]} x {size[1]}: leave sentinels.prompts and sentinels.images as they were"
                )
            self._raw = {name: _tensor(values) for name, values in found["raw"].items()}
            small = np.frombuffer(bytes.fromhex(found["small"]), np.uint8).reshape(-1, 3, 8, 8)
            self._small = torch.from_numpy(small.copy()) / 255
        else:
            self._raw, self._small = watched.look(watched.draw_raw)
        trained = {REWARD + reward.name for reward in watched.rewards if reward.name not in watched.held_out}
        self._bands = {
            name: band(watched.config, name, len(self._small) if name == "drift" else len(values), len(values))
            for name, values in self._raw.items() if name not in trained | set(watched.config.off)
        }  # fmt: skip
        self._write()

    def look(self, step: int) -> dict[str, float]:
        """Metrics after iteration `step`: of each sentinel `sentinel/NAME` in its own units and `sentinel/NAME/place`,
        how many have left their bands, and `transfer/NAME` of every held-out reward."""
        now, _ = self._watched.look(self._watched.draw, (self._raw, self._small))
        metrics = {}
        for name in self._bands:
            metrics[f"sentinel/{name}"] = float(now[name].nanmean())
            metrics[f"sentinel/{name}/place"] = place(now[name], self._raw[name])
        gains = {
            name.removeprefix(REWARD): _gain(values, self._raw[name])
            for name, values in now.items() if name.startswith(REWARD)
        }  # fmt: skip
        gain, ratios = transfer(gains, self._watched.trained_on, self._watched.held_out)
        if self._watched.trained_on:
            metrics |= {"transfer/gain": gain, **{f"transfer/{name}": ratio for name, ratio in ratios.items()}}
        metrics[OUT] = float(len(self.left(metrics)))
        if not metrics[OUT]:
            self._inside.add(step)
        return metrics

    def left(self, metrics: Mapping[str, float]) -> list[str]:
        """What is outside of its band, in words, by what `look` returned."""
        found = [
            f"{name} {metrics[f'sentinel/{name}']:.3g} (Raw {float(self._raw[name].nanmean()):.3g}, place "
            f"{metrics[f'sentinel/{name}/place']:.2f})"
            for name, limits in self._bands.items() if limits.left(_place(metrics, name))
        ]  # fmt: skip
        least = self._watched.config.min_transfer
        if least is not None and metrics.get("transfer/gain", 0.0) >= _LEAST_GAIN:
            found += [
                f"{key.removeprefix('transfer/')} has {ratio:+.2f} of the trained rewards' gain"
                for key, ratio in metrics.items()
                if key.startswith("transfer/") and key != "transfer/gain" and ratio < least
            ]
        return found

    def must_stop(self, metrics: Mapping[str, float]) -> str | None:
        """Why the run must not go on after an iteration with these metrics; None: it may."""
        far = [name for name, limits in self._bands.items() if limits.far(_place(metrics, name))]
        if far:
            return f"{', '.join(far)} left what Raw draws: {'; '.join(self.left(metrics))}"
        most, kl = self._watched.config.max_kl, metrics.get("kl", 0.0)
        if most is not None and kl > most:
            return f"kl is {kl:.3g}, and at most {most:.3g} is borne (sentinels.max_kl)"
        return None

    def good(self) -> Checkpoint | None:
        """The last checkpoint that was taken while all sentinels were inside of their bands."""
        return max((found for found in self._run.checkpoints() if found.step in self._inside), default=None)

    def stopped(self, step: int, why: str) -> RunStopped:
        """The error that ends the run after iteration `step`; the report is told too."""
        good = self.good()
        self._write({"step": step, "why": why, "good": good.step if good else None})
        kept = "No checkpoint was taken while all sentinels were inside of their bands"
        if good is not None:
            kept = (f"The last checkpoint with all sentinels inside of their bands is {good.path}, and its weights are "
                    f"exported in {self._run.path}")
        return RunStopped(
            f"iteration {step}: {why}. {kept}. See {self._run.path / 'report.html'} and docs/when-it-goes-wrong.md. If "
            "this is wanted: --resume with sentinels.stop=null, or name the sentinel in sentinels.off"
        )

    def _write(self, stopped: dict[str, object] | None = None) -> None:
        self._run.write_json(FILE, {
            "prompts": len(self._watched.prompts), "images": self._watched.config.images, "stopped": stopped,
            "bands": {name: asdict(limits) for name, limits in self._bands.items()},
            "raw": {name: values.tolist() for name, values in self._raw.items()},
            "small": self._small.mul(255).round().byte().numpy().tobytes().hex(),
        })  # fmt: skip


def _place(metrics: Mapping[str, float], name: str) -> float:
    return metrics.get(f"sentinel/{name}/place", math.nan)


def _gain(now: Tensor, raw: Tensor) -> float:
    """In spreads of Raw; NaN where Raw has none."""
    known = raw[~raw.isnan()]
    spread = float(known.std(correction=0)) if len(known) else 0.0
    return float(now.nanmean() - known.mean()) / spread if spread > 0 else math.nan


def _tensor(values: object) -> Tensor:
    """Of nested lists, with NaN for null."""
    return torch.from_numpy(np.array(values, dtype=float))
