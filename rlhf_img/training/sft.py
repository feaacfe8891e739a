"""A run of SFT: its settings, its data, its parts, and one iteration."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_img.algorithms import sft
from rlhf_img.algorithms.sft import NoisedImages, SFTConfig
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import PLAYGROUND, Model
from rlhf_img.model.policy import Policy, make_policy
from rlhf_img.model.vae import encode
from rlhf_img.playground import variants
from rlhf_img.rewards import load_rewards
from rlhf_img.training import distributed
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.captioned import Captioned, captions, from_folder, from_variant
from rlhf_img.training.config import RunConfig
from rlhf_img.training.loop import Clock, Job, open_model, watched_rewards
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.watch import SentinelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """A run on captioned images. Every field can be set in a run file or as `key=value`, nested ones with dots.

    `rewards` measure, and do not train.
    """

    data: str | None = None
    """A folder of images with captions: a captions.jsonl or .csv (file, prompt), or a .txt beside each image."""
    variant: str | None = None
    """Instead: what the playground renders, "striped" (a style), "warm" (a colour bias) or "ring" (a new shape)."""
    examples: int = 1024
    """Images that are rendered for `variant`."""
    steps: int = 100
    sentinels: SentinelConfig = field(default_factory=lambda: SentinelConfig(every=0))
    """None by default: a new style, colour or shape is meant to leave what the model drew."""
    sft: SFTConfig = field(default_factory=SFTConfig)

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range, and unless there is one source of images."""
        super(Config, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        if (self.data is None) == (self.variant is None):
            raise RlhfImgError("what is to be learnt? Give --data FOLDER with captioned images, or for the playground "
                               f"--variant {'|'.join(variants.VARIANTS)}")
        if self.examples < 1:
            raise RlhfImgError(f"examples must be 1 or more; got {self.examples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an iteration works with."""

    config: Config
    model: Model
    policy: Policy
    conditioner: Conditioner
    optimizer: torch.optim.Optimizer
    data: list[Captioned]
    lengths_N: np.ndarray
    """Of their captions, in tokens."""
    latents: dict[int, Tensor]
    """Of the images seen so far, (N, C) on the CPU."""


def prepare(config: Config) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any training."""
    distributed.require_one("SFT")
    data = from_variant(config.variant, config.examples) if config.variant else from_folder(Path(config.data or ""))
    watched = watched_rewards(load_rewards(config.rewards), config)
    if config.variant:
        watched += load_rewards([{"reward": "variant", "name": config.variant, "options": {"of": config.variant}}])
    model = open_model(config)
    policy = make_policy(model.transformer, None if config.full else config.lora, config.seed)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()), lr=config.sft.lr, weight_decay=config.sft.weight_decay
    )
    conditioner = Conditioner(model, store=config.compute.text_store)
    parts = Parts(
        config=config, model=model, policy=policy, conditioner=conditioner, optimizer=optimizer, data=data,
        lengths_N=conditioner.lengths([image.prompt for image in data]), latents={},
    )  # fmt: skip
    job = Job(
        config=config, model=model, conditioner=parts.conditioner, trained={"policy": (policy, optimizer)},
        watched=watched, heldout_prompts=_heldout_prompts(config, data), iterate=partial(iteration, parts),
        texts=tuple(captions(data)),
        notes=(f"{len(data)} images with {len(captions(data))} different captions",),
    )  # fmt: skip
    return parts, job


def iteration(parts: Parts, step: int) -> dict[str, float]:
    """One iteration: draw images, noise them, update the policy. Returns flat metrics."""
    config, clock = parts.config, Clock()
    lr = config.sft.lr * (1 - (step - 1) / config.steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    places = prompt_room.turns(parts.lengths_N, config.sft.images, step - 1, config.seed)
    drawn = batches(parts, places, config.seed * 100_003 + step)
    clock.lap("data")
    try:
        metrics = sft.update(parts.policy, parts.optimizer, drawn, config.sft)
    except FloatingPointError as error:
        raise RunStopped(
            f"iteration {step}: {error}. The last checkpoint stays; start again with a lower sft.lr"
        ) from error
    clock.lap("train")
    return {**metrics, **clock.times(), "lr": lr}


def batches(parts: Parts, places: list[int], seed: int) -> list[NoisedImages]:
    """Images at `draws` noise levels each, some without their caption; those of one caption length together.

    They depend on the places and the seed alone.
    """
    settings, generator = parts.config.sft, torch.Generator().manual_seed(seed)
    latents = _encoded(parts, places)
    levels = sft.draw_levels(settings.draws, len(places), generator, settings.levels)
    noise = torch.randn((settings.draws, *latents.shape), generator=generator)
    dropped = (torch.rand(len(places), generator=generator) < settings.drop).tolist()
    told = ["" if drop else parts.data[i].prompt for i, drop in zip(places, dropped, strict=True)]
    texts = parts.conditioner.encode(told)
    side, device = parts.model.default_size, parts.model.device
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        groups[len(text)].append(row)
    return [
        sft.noised(
            latents[rows].repeat(settings.draws, 1, 1).to(device),
            torch.stack([texts[row] for row in rows]).repeat(settings.draws, 1, 1),
            levels[:, rows].flatten().to(device), noise[:, rows].flatten(0, 1).to(device),
            parts.model.grid(side, side),
        )
        for _, rows in sorted(groups.items())
    ]  # fmt: skip


@torch.no_grad()
def _encoded(parts: Parts, places: list[int]) -> Tensor:
    """Latents (B, N, C) on the CPU, each image encoded once."""
    new = [i for i in dict.fromkeys(places) if i not in parts.latents]
    if new:
        images = torch.stack([parts.data[i].pixels(parts.model.default_size) for i in new])
        parts.latents.update(zip(new, encode(parts.model, images.to(parts.model.device)).cpu(), strict=True))
    return torch.stack([parts.latents[i] for i in places])


def _heldout_prompts(config: Config, data: list[Captioned]) -> list[Prompt]:
    if config.eval_prompts is not None:
        found = prompt_room.read_prompts(Path(config.eval_prompts))
    elif config.variant is not None:
        found = [Prompt(text) for text in variants.prompts(config.variant, "heldout", config.eval.prompts)]
    elif config.model == PLAYGROUND:
        found = prompt_room.from_playground("heldout", config.eval.prompts)
    else:
        found = [Prompt(text) for text in captions(data)]
    return found[: config.eval.prompts]
