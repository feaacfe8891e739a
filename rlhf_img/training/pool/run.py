"""The prompt pool of a run: draws an iteration's prompts, learns from its groups, resumes to the same bits."""

import dataclasses
import json
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards import Images, Reward, apply_gates, learnable, repeat_noise
from rlhf_img.rubrics.schema import Gate
from rlhf_img.training import distributed
from rlhf_img.training.config import RunConfig
from rlhf_img.training.pool.store import SUFFIX, Observed, PoolFile
from rlhf_img.training.pool.weights import (
    Floats,
    Group,
    PoolConfig,
    Statistics,
    about_one_length,
    draw_weighted,
    effective_number,
    resting,
    sampling_weights,
)
from rlhf_img.training.prompts import GOLDEN, Prompt, turns
from rlhf_img.training.rundir import RunDir

log = logging.getLogger(__name__)

_COPY = "prompts.sqlite"
"""The run's own copy of its pool, in its folder."""
_STATE = "pool.safetensors"
_STREAM = 0x9001
"""Keeps this generator apart from others of the run's seed."""


def pool_of(config: RunConfig) -> Path | None:
    """The prompt pool that a run's prompts come from; None if they come from elsewhere."""
    return Path(config.prompts) if config.prompts is not None and Path(config.prompts).suffix == SUFFIX else None


def with_own_pool(config: RunConfig, run: RunDir) -> RunConfig:
    """The settings of a run with a copy of its prompt pool in the run's folder in the pool's place.

    The copy is made when the run begins: others may change the pool, and a resumed run must draw from the same prompts.
    Raises RlhfImgError if there is no such pool, or it cannot be read.
    """
    pool = pool_of(config)
    if pool is None:
        return config
    copy = run.path / _COPY
    if distributed.is_first() and not copy.exists():
        PoolFile(pool).copy_to(copy)
    distributed.gather(None)  # the others wait for it
    return dataclasses.replace(config, prompts=str(copy))


class PromptPool:
    """The prompts that a run trains on, and which of them an iteration gets.

    Every process of a run has the same one: what it draws depends on the seed, the iteration, and the statistics, which
    come from the groups of all processes.
    """

    def __init__(
        self, prompts: Sequence[Prompt], config: PoolConfig, seed: int, source: Path | None = None,
        lengths_N: Int[np.ndarray, " N"] | None = None,
    ) -> None:  # fmt: skip
        """source: the pool that the prompts were read from, if it was one, whose knowledge of them is the start.

        lengths_N: of the prompts, in tokens; those of an iteration are about as long.
        """
        self._prompts, self._config, self._seed = list(prompts), config, seed
        self._lengths_N = np.zeros(len(prompts), np.int64) if lengths_N is None else lengths_N
        self._stats, self._cluster_N = Statistics.unknown(len(prompts)), np.zeros(len(prompts), np.int64)
        self._clock, self._ids = 0, list[int]()
        self._origin: Path | None = None
        if source is not None:
            self._open(PoolFile(source))
        self.noise: dict[str, float] = {}
        """Repeat noise of rewards, see `measure_noise`."""
        self._run, self._step = uuid.uuid4().hex, 0
        self._drawn: list[int] = []
        self._weights_N: Floats | None = None
        self._unpublished: list[tuple[int, int, Group]] = []

    def _open(self, file: PoolFile) -> None:
        by_text = {entry.text: entry for entry in file.entries()}
        entries = [by_text[prompt.text] for prompt in self._prompts]
        self._ids = [entry.id for entry in entries]
        self._clock, self._origin = file.clock, file.origin
        self._stats = file.statistics(self._ids)
        self._cluster_N = np.array([entry.cluster for entry in entries], np.int64)

    def draw(self, step: int, count: int) -> list[Prompt]:
        """The prompts of iteration `step`, counted from 1."""
        if self._config.curriculum:
            self._weights_N = sampling_weights(
                self._stats, self._cluster_N, self._clock + step, self._config, least=min(count, len(self._prompts))
            )
            rng = np.random.default_rng((self._seed, step, _STREAM))
            alike_N = about_one_length(self._weights_N, self._lengths_N, count, step * GOLDEN % 1)
            self._drawn = draw_weighted(alike_N, count, rng)
        else:
            self._drawn = turns(self._lengths_N, count, step - 1, self._seed)
        return [self._prompts[row] for row in self._drawn]

    def measure_noise(self, rewards: Sequence[Reward], prompt: Prompt, images: Images) -> dict[str, float]:
        """Scores one group of images again and again, in every process its own, and keeps how far a reward differs from
        itself; returns that as metrics where it does. To be done once, in the first iteration."""
        count = len(images)
        mine = repeat_noise(rewards, [prompt.text] * count, images, {"rubrics": [prompt.rubric] * count}, count)
        everyone = distributed.gather(mine)
        for name in dict.fromkeys(name for one in everyone for name in one):
            values = [one[name] for one in everyone if name in one]
            self.noise[name] = float(np.sqrt(np.mean(np.square(values))))
        return {f"reward/{name}/noise": value for name, value in self.noise.items() if value}

    def record(
        self, step: int, rewards: Sequence[Reward], values_PGK: Tensor, gates: Sequence[Sequence[Gate]]
    ) -> dict[str, float]:
        """Learns from the groups of the prompts that were drawn last; returns metrics, all "pool/...".

        values_PGK: raw rewards of all processes, in the order of `draw`; gates: of each prompt's rubric. A group of
        which too little was scored says nothing and is passed over.
        """
        gated_PGK, _ = apply_gates(values_PGK, rewards, gates)
        columns = (column.tolist() for column in learnable(rewards, gated_PGK, self.noise))
        for row, (score, variance, flat) in zip(self._drawn, zip(*columns, strict=True), strict=True):
            if not np.isnan(variance):
                group = Group(None if np.isnan(score) else score, variance, bool(flat))
                self._stats.record(row, group, self._clock + step)
                self._unpublished.append((step, row, group))
        self._step = step
        return self._metrics(step)

    def _metrics(self, step: int) -> dict[str, float]:
        stats, seen_N = self._stats, self._stats.groups_N > 0
        scores = stats.score_N[~np.isnan(stats.score_N)]
        found = {"pool/seen": float(seen_N.mean())}
        found |= {"pool/difficulty": 1 - float(scores.mean())} if len(scores) else {}
        found |= {"pool/spread": float(np.sqrt(stats.variance_N[seen_N].mean()))} if seen_N.any() else {}
        if self._weights_N is not None:
            found["pool/retired"] = float(resting(stats, self._clock + step, self._config).sum())
            found["pool/effective"] = effective_number(self._weights_N)
        return found

    def save(self, folder: Path) -> None:
        """Writes all that changes into a checkpoint's folder."""
        arrays = {name: getattr(self._stats, f"{name}_N") for name in _ARRAYS}
        rows = [(step, row, g.score, g.variance, g.flat) for step, row, g in self._unpublished]
        told = {"run": self._run, "step": self._step, "noise": self.noise, "unpublished": rows}
        save_file(arrays, folder / _STATE, metadata={"state": json.dumps(told)})

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Raises RlhfImgError if it is damaged or of other prompts."""
        try:
            with safe_open(folder / _STATE, framework="numpy") as stored:
                told = json.loads(stored.metadata()["state"])
                arrays = [stored.get_tensor(name) for name in _ARRAYS]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RlhfImgError(
                f"the checkpoint {folder} cannot be read ({error}); delete it to resume from an earlier one"
            ) from error
        if len(arrays[0]) != len(self._prompts):
            raise RlhfImgError(f"the checkpoint {folder} knows {len(arrays[0])} prompts, and the run has "
                               f"{len(self._prompts)} now: give it the prompts that it began with")
        self._stats = Statistics(*arrays)
        self._run, self._step, self.noise = told["run"], told["step"], told["noise"]
        self._unpublished = [(step, row, Group(*group)) for step, row, *group in told["unpublished"]]

    def publish(self) -> None:
        """Adds what was learnt to the pool that the run began with: call it after a checkpoint, never before.

        A pool that cannot be written does not stop the run: it is warned of and tried again at the next checkpoint.
        """
        if self._origin is None or not distributed.is_first():
            self._unpublished = []
            return
        observed: list[Observed] = [(step, self._ids[row], group) for step, row, group in self._unpublished]
        try:
            PoolFile(self._origin).publish(self._run, self._step, observed)
        except RlhfImgError as error:
            log.warning("what this run learns of its prompts waits for its next checkpoint: %s", error)
        else:
            self._unpublished = []


_ARRAYS = ("groups", "score", "variance", "flat", "last")
