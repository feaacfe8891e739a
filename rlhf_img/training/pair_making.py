"""Making preference pairs from a model: a stronger against a weaker setting, or the best of a group against its worst.

Delta learning (arXiv 2507.06187): a pair teaches by the difference of its images, whatever the quality of each. So the
images of a prompt share their initial noise, and differ by what made them. Krea 2's report adds that most pairs should
hold an image of the model that is trained; the share is counted.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_img.config import from_mapping, to_mapping
from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import load_lora
from rlhf_img.model.loading import PLAYGROUND, Model, load
from rlhf_img.model.lora import role
from rlhf_img.rewards import Images, Reward, apply_gates, load_rewards, score
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.pairs import Pair, encode_image, write_pairs
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.samples import draw_images

_PLAYGROUND_PROMPTS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How images are drawn."""

    steps: int = 16
    """Denoising steps."""
    guidance: float = 0.0
    """Krea's g; 0 = off."""
    lora: str | None = None
    """Folder of an adapter on the model."""

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        if self.steps < 1 or self.guidance < 0:
            raise ValueError(f"steps must be 1 or more and guidance 0 or more; got {self.steps}, {self.guidance}")

    @property
    def on_policy(self) -> bool:
        """Whether the model's own distribution is drawn from: no guidance, no adapter."""
        return self.guidance == 0 and self.lora is None

    def __str__(self) -> str:
        """ "16 steps, g 2, lora adapter"."""
        lora = f", lora {Path(self.lora).name}" if self.lora else ""
        return f"{self.steps} steps, g {self.guidance:g}{lora}"


def parse_setting(text: str) -> Setting:
    """ "steps=8,guidance=2,lora=FOLDER". Raises RlhfImgError for anything else."""
    given: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals or key not in ("steps", "guidance", "lora"):
            raise RlhfImgError(f'"{item}" sets nothing: {did_you_mean(key, ("steps", "guidance", "lora"))}, '
                               "such as steps=8,guidance=2")
        try:
            given[key] = value if key == "lora" else float(value) if key == "guidance" else int(value)
        except ValueError as error:
            raise RlhfImgError(f'"{item}": {key} is a number') from error
    return from_mapping(Setting, given, "setting")


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeConfig:
    """What `pairs make` makes; kept beside the data, so that it can go on later."""

    model: str = PLAYGROUND
    prompts: str | None = None
    """File of prompts; None: the playground's training prompts."""
    count: int = 512
    """Prompts."""
    rewards: str | None = "rubric,artifact"
    """What ranks a group. With two settings: what must agree with the order of the settings; None: it is believed."""
    group: int = 8
    """Images a prompt, of which best and worst make a pair. With two settings: pairs a prompt."""
    pairs: int = 1
    """Pairs of a group: best against worst, second best against second worst, ..."""
    min_margin: float = 0.05
    """Pairs whose rewards differ by less are left out."""
    setting: Setting = Setting()
    """How groups are drawn."""
    strong: Setting | None = None
    """With `weak`: how the chosen images are drawn."""
    weak: Setting | None = None
    """With `strong`: how the rejected images are drawn, from the same noise."""
    shard_prompts: int = 32
    """Prompts a file; a run that is stopped goes on with the next file."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for values that cannot work together."""
        if (self.strong is None) != (self.weak is None):
            raise ValueError("a delta needs both --strong and --weak")
        if self.strong is not None and self.strong == self.weak:
            raise ValueError(f"the strong and the weak setting are the same: {self.strong}")
        if self.strong is None and (self.rewards is None or self.group < 2 * self.pairs):
            raise ValueError("best against worst needs rewards and groups of at least two images a pair")
        if min(self.count, self.group, self.pairs, self.shard_prompts) < 1:
            raise ValueError("count, group, pairs and shard_prompts must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What one call of `make` did."""

    written: int
    """Pairs."""
    left_out: int
    """Pairs without a margin that is large enough, or with identical images."""
    skipped: int
    """Shards that were there already."""


def make(
    config: MakeConfig, out: Path, *, part: tuple[int, int] = (0, 1), progress: Callable[[int, int], None] | None = None
) -> Made:
    """Writes `out`/pairs-00000.parquet, ...; files that are there already stay, so that a stopped run goes on.

    `part` is (i, n): only every n-th file from the i-th on, so that n processes can share the work. Raises RlhfImgError
    if `out` holds pairs of other settings, and for whatever `MakeConfig` names and does not exist.
    """
    rewards = load_rewards(config.rewards) if config.rewards else []
    asked = prompts_of(config)
    _keep_settings(config, out)
    starts = list(range(0, len(asked), config.shard_prompts))[part[0] :: part[1]]
    files = [out / f"pairs-{start // config.shard_prompts:05d}.parquet" for start in starts]
    left = [(start, file) for start, file in zip(starts, files, strict=True) if not file.exists()]
    if not left:
        return Made(written=0, left_out=0, skipped=len(files))
    model = load(config.model)
    conditioner = Conditioner(model)
    for number, setting in enumerate(_settings(config)):
        if setting.lora:
            load_lora(model, setting.lora, _role(number))
    written = left_out = 0
    for done, (start, file) in enumerate(left):
        some = asked[start : start + config.shard_prompts]
        found, dropped = _shard(config, model, conditioner, rewards, some, start)
        write_pairs(file, found)
        written, left_out = written + len(found), left_out + dropped
        if progress is not None:
            progress(done + 1, len(left))
    return Made(written=written, left_out=left_out, skipped=len(files) - len(left))


def prompts_of(config: MakeConfig) -> list[Prompt]:
    """The prompts that pairs are made of. Raises RlhfImgError if there are none, or too few."""
    if config.prompts is not None:
        asked = prompt_room.read_prompts(Path(config.prompts))
    elif config.model == PLAYGROUND:
        asked = prompt_room.from_playground("train", min(config.count, _PLAYGROUND_PROMPTS))
    else:
        raise RlhfImgError(f'the model "{config.model}" needs prompts: give --prompts FILE (.txt, .jsonl or .yaml)')
    return asked[: config.count]


def _keep_settings(config: MakeConfig, out: Path) -> None:
    file = out / "make.json"
    mapping = to_mapping(config)
    if file.exists():
        before = json.loads(file.read_text())
        if changed := [key for key in mapping if before.get(key) != json.loads(json.dumps(mapping[key]))]:
            raise RlhfImgError(f"{out} holds pairs made with another {', '.join(changed)}: give another --out")
        return
    if any(out.glob("*.parquet")):
        raise RlhfImgError(f"{out} holds pairs that `pairs make` has not made: give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mapping, indent=1))
    except OSError as error:
        raise RlhfImgError(f"{out} cannot be written: {error.strerror}; give another --out") from error


def _settings(config: MakeConfig) -> list[Setting]:
    return [config.setting] if config.strong is None or config.weak is None else [config.strong, config.weak]


def _role(number: int) -> str:
    return f"setting_{number}"


def _shard(
    config: MakeConfig, model: Model, conditioner: Conditioner, rewards: Sequence[Reward], prompts: Sequence[Prompt],
    start: int,
) -> tuple[list[Pair], int]:  # fmt: skip
    """The pairs of some prompts, and how many were left out. `start` is the number of the first, for its seeds."""
    repeated = [p for p in prompts for _ in range(config.group)]
    seeds = [(config.seed * 1_000_003 + start) * 1_000 + i for i in range(len(repeated))]
    settings = _settings(config)
    drawn = []
    for number, setting in enumerate(settings):
        with role(model.transformer, _role(number) if setting.lora else None):
            images = draw_images(
                model, conditioner, repeated, seeds, num_steps=setting.steps, guidance=setting.guidance
            )
        drawn.append(Images(images))
    totals = [total_reward(rewards, repeated, images, config.group) for images in drawn]
    pairs: list[Pair] = []
    left_out = 0
    for p, prompt in enumerate(prompts):
        rows = range(p * config.group, (p + 1) * config.group)
        for better, worse, margin in _choices(config, totals, rows):
            chosen, rejected = drawn[0][better], drawn[-1][worse]
            enough = margin is None or margin >= config.min_margin  # False where a reward could not tell
            if not enough or chosen.tobytes() == rejected.tobytes():
                left_out += 1
                continue
            pairs.append(Pair(
                prompt=prompt.text, chosen=encode_image(chosen), rejected=encode_image(rejected), margin=margin,
                source=_source(config), on_policy=any(s.on_policy for s in settings),
            ))  # fmt: skip
    return pairs, left_out


def _choices(config: MakeConfig, totals: list[list[float]], rows: range) -> list[tuple[int, int, float | None]]:
    """Rows of the better and the worse image, and the margin."""
    if config.strong is not None:
        known = config.rewards is not None
        return [(row, row, totals[0][row] - totals[1][row] if known else None) for row in rows]
    ranked = sorted((row for row in rows if not math.isnan(totals[0][row])), key=lambda row: totals[0][row])
    some = range(min(config.pairs, len(ranked) // 2))
    return [(ranked[-1 - k], ranked[k], totals[0][ranked[-1 - k]] - totals[0][ranked[k]]) for k in some]


def _source(config: MakeConfig) -> str:
    if config.strong is not None:
        return f"{config.strong} > {config.weak}"
    return f"best of {config.group} by {config.rewards}; {config.setting}"


def total_reward(rewards: Sequence[Reward], prompts: Sequence[Prompt], images: Images, group: int) -> list[float]:
    """Weighted mean of the objectives under their gates, in their own units; NaN where one of them could not tell."""
    if not rewards:
        return [math.nan] * len(images)
    scores = score(
        rewards, [p.text for p in prompts], images, {"rubrics": [p.rubric for p in prompts]}, group_size=group,
        max_unscored=1.0,
    )  # fmt: skip
    gates = [(p.rubric or rubric_of(p.text)).gates for p in prompts[::group]]
    capped, _ = apply_gates(scores.values_BK.unflatten(0, (-1, group)), rewards, gates)
    objectives = [k for k, reward in enumerate(rewards) if reward.is_objective]
    weights_K = torch.tensor([rewards[k].weight for k in objectives])
    if not objectives or not weights_K.any():
        raise RlhfImgError("no reward ranks images: at least one must be an objective with a weight above 0")
    totals: list[float] = ((capped[..., objectives] @ weights_K) / weights_K.sum()).flatten().tolist()
    return totals
