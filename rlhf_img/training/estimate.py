"""Memory and arithmetic of a training step before anything is loaded, from the run's settings and the model's configs.

What stands all the time is added up: weights, adapters, their averages, the optimiser's state. On top comes the phase
that needs most: sampling, training, the optimiser's step, decoding or reading prompts. What a phase needs is counted on
its own code (model/counting.py). Prompts are taken to be of one length, so that batches are as full as they can be.
Not counted: rewards, the CUDA context (about 0.5 GB), what an allocator loses to fragments, compiled blocks' savings.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import HELD_EVERY, images_at_once
from rlhf_img.config import to_mapping
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import BATCH_SIZE
from rlhf_img.model.counting import Batch, as_text, count_decode, count_passes, dress
from rlhf_img.model.policy import LoRAConfig
from rlhf_img.model.sizes import Sizes, sizes_of, weight_bytes
from rlhf_img.model.vae import at_once
from rlhf_img.training import dpo, sft, tdm
from rlhf_img.training.config import RunConfig
from rlhf_img.training.loop import run_dtype
from rlhf_img.training.online import OnlineConfig

PREFIX = 34
"""Tokens of the template before the prompt; they are encoded and dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Forwards of a step that are alike."""

    phase: str
    images: int
    """Image-forwards of the step, and how many of them go through at once."""
    at_once: int
    train: bool = False
    """With gradients and the way back."""
    graphs: int = 1
    """Batches whose activations are kept at once."""
    during: str | None = None
    """The phase whose activations are there meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a step does."""

    works: tuple[Work, ...]
    prompts: int
    """Prompts that are read, at most."""
    roles: int = 1
    """Adapters, or copies of the blocks, that are trained."""
    started: bool = False
    """Whether a frozen adapter is there too."""
    gradients: int = 1
    """How many of them, in multiples of what is trained, there are at once."""
    decoded: int = 0
    """Images that are decoded."""
    latents: int = 0
    """Images whose latents are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a step needs, in bytes and FLOP."""

    standing: dict[str, float]
    """What is there all the time."""
    phases: dict[str, float]
    """What each phase needs beside."""
    flop: dict[str, float]

    @property
    def peak(self) -> float:
        """Most bytes at once."""
        return sum(self.standing.values()) + max(self.phases.values())


def plan_of(config: RunConfig) -> Plan:
    """What a step of this run does. Raises RlhfImgError for an algorithm that is not known here."""
    match config:
        case OnlineConfig():
            return _online(config)
        case tdm.Config():
            c, images = config.tdm, config.tdm.prompts * config.tdm.images
            at_once, guided = min(c.batch_size, images), int(c.guidance > 0)
            # Of both kinds of iterations, one of the warm-up is the costlier one.
            updates, judges = (c.warmup_updates, c.warmup_substeps * (1 + guided)) if c.warmup else (1, 2 + guided)
            return Plan(
                works=(
                    Work(phase="rollout", images=c.num_steps * images, at_once=at_once),
                    Work(phase="train", images=(c.critic_updates + updates) * images, at_once=at_once, train=True),
                    Work(phase="reference", images=judges * updates * images, at_once=at_once, during="train"),
                ),
                prompts=c.prompts, roles=2, started=config.teacher is not None, latents=images * (c.num_steps + 1),
            )  # fmt: skip
        case dpo.Config():
            count = config.dpo.pairs * config.dpo.draws
            at_once = min(max(1, config.dpo.batch_size // 2), count)
            return Plan(
                works=(
                    Work(phase="reference", images=2 * count, at_once=at_once),
                    Work(phase="train", images=2 * count, at_once=at_once, train=True, graphs=2),
                ),
                prompts=config.dpo.pairs, started=config.start is not None, gradients=5, latents=6 * count,
            )  # fmt: skip
        case sft.Config():
            count = config.sft.images * config.sft.draws
            train = Work(phase="train", images=count, at_once=min(config.sft.batch_size, count), train=True)
            return Plan(works=(train,), prompts=config.sft.images, latents=3 * count)
    raise RlhfImgError(f"there is no estimate for a {type(config).__module__.rpartition('.')[2]} run")


def _online(config: OnlineConfig) -> Plan:
    c, images = config.method, config.method.prompts * config.method.group
    rows = min(images_at_once(c), images)
    steps = isinstance(c, GRPOConfig) and c.likelihood == "steps"
    terms = c.window if isinstance(c, GRPOConfig) and steps else c.draws
    kept = c.prompts * min(c.trained or c.group, c.group)
    trained = terms * kept + (0 if steps else c.holds * math.ceil(kept / HELD_EVERY))
    together = math.ceil(rows * kept / images) if steps else min(c.batch_size, trained)
    old = 0 if steps or not (c.averaged or c.updates > 1) else trained
    works = [
        Work(phase="rollout", images=c.num_steps * images + old, at_once=rows),
        Work(phase="train", images=trained, at_once=together, train=True),
    ]
    if c.kl > 0 or (c.holds and not steps):
        guided = isinstance(c, GRPOConfig) and c.reference_guidance > 0
        count = trained + (terms * kept if guided else 0)
        works.append(Work(phase="reference", images=count, at_once=together, during="train"))
    return Plan(
        works=tuple(works), prompts=c.prompts, started=config.start is not None, decoded=images,
        latents=3 * trained + 2 * images,
    )


def estimate(
    config: RunConfig, sizes: Sizes, *, dtype: torch.dtype, size: int | None = None, text: int = 100,
    gpu: bool = True,
) -> Estimate:  # fmt: skip
    """What a step of this run needs at `size` pixels, with prompts of `text` tokens and a base of `dtype`.

    On a GPU AdamW works on all weights at once, and what is offloaded is elsewhere.
    """
    plan, size = plan_of(config), size or sizes.default_size
    grid, lora = sizes.grid(size), None if config.full else config.lora
    weights = {name: float(weight_bytes(part, dtype)) for name, part in sizes.parts().items()}
    trained = plan.roles * _trained_bytes(sizes, lora, dtype)
    gradients = plan.gradients * trained
    away = gpu and config.compute.offload
    standing = {"transformer": weights["transformer"]} if away else dict(weights)
    if lora:
        standing["adapters and averages"] = trained * (2 + plan.started / plan.roles)
    else:
        standing |= {"copies": plan.roles * weights["transformer"], "averages": trained}
    standing["optimiser"] = 2 * trained
    standing["latents"] = 4.0 * plan.latents * grid[0] * grid[1] * int(sizes.transformer["in_channels"])

    # Gradients stay from one step to the next, and a single way back makes them as activations go.
    found, flop = {}, {}
    phases = {"optimiser": gradients + (trained / plan.roles if gpu else 0.0)}
    for work in plan.works:
        batch = Batch(images=work.at_once, grid=grid, text=text)
        passes = found[work.phase] = count_passes(
            sizes.transformer, lora, dtype, batch, config.compute.checkpoint_blocks
        )
        flop[work.phase] = (passes.train_flop if work.train else passes.infer_flop) * work.images / work.at_once
        if not work.train:
            phases[work.phase] = gradients + passes.infer_peak + (found[work.during].kept if work.during else 0.0)
        else:
            there = gradients if work.images > plan.roles * work.at_once else gradients - trained / plan.roles
            phases[work.phase] = there + passes.train_peak + (work.graphs - 1) * passes.kept
    phases["conditioning"] = gradients + _conditioning(sizes, min(plan.prompts, BATCH_SIZE), text, dtype)
    if plan.decoded:
        some = min(at_once(size, size), plan.decoded)
        peak, once = count_decode(as_text(sizes.vae), dtype, some, size)
        phases["decoding"], flop["decoding"] = gradients + peak, once * plan.decoded / some
    if away:
        for name, part in (("conditioning", "text_encoder"), ("decoding", "vae")):
            phases[name] = phases.get(name, 0.0) + weights[part]
    return Estimate(standing=standing, phases=phases, flop=flop)


def _trained_bytes(sizes: Sizes, lora: LoRAConfig | None, dtype: torch.dtype) -> float:
    """Of one role's weights; their average, gradients and each moment of the optimiser are as large."""
    transformer = sizes.parts()["transformer"]
    dress(transformer, lora, dtype, 0)
    return float(sum(p.nbytes for p in transformer.parameters() if p.requires_grad))


def _conditioning(sizes: Sizes, prompts: int, text: int, dtype: torch.dtype) -> float:
    """The text encoder's states of all layers, and the work of one."""
    encoder = sizes.text_encoder.text_config
    states = encoder.num_hidden_layers + 1 + int(sizes.transformer["num_text_layers"])
    return float(
        prompts * (text + PREFIX) * (states * encoder.hidden_size + 3 * encoder.intermediate_size) * dtype.itemsize
    )


def what_fits(
    config: RunConfig, sizes: Sizes, limit: float, *, dtype: torch.dtype, size: int | None = None, text: int = 100,
    gpu: bool = True,
) -> tuple[RunConfig, Estimate] | None:  # fmt: skip
    """The run with the fewest changes that needs at most `limit` bytes: offloading, then checkpointing of all blocks,
    then smaller batches; None if nothing helps."""
    for settings in _smaller(config, gpu):
        found = estimate(settings, sizes, dtype=dtype, size=size, text=text, gpu=gpu)
        if found.peak <= limit:
            return settings, found
        if sum(found.standing.values()) > limit:
            return None
    return None


def _smaller(config: RunConfig, gpu: bool) -> Iterator[RunConfig]:
    compute = dataclasses.replace(config.compute, offload=gpu or config.compute.offload)
    yield (config := dataclasses.replace(config, compute=compute))
    yield (config := dataclasses.replace(config, compute=dataclasses.replace(compute, checkpoint_blocks="all")))
    name = algorithm_of(config)
    own = getattr(config, name)
    least = 2 if name == "dpo" else 1
    while own.batch_size > least:
        own = dataclasses.replace(own, batch_size=max(least, own.batch_size // 2))
        yield dataclasses.replace(config, **{name: own})


def algorithm_of(config: RunConfig) -> str:
    """The name of the run's algorithm, which is that of its own settings too."""
    return type(config).__module__.rpartition(".")[2]


def memory_of(device: torch.device) -> float:
    """Bytes that are free for a run: of the GPU, or of the machine as Linux reports them (elsewhere: all of it)."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.is_file():
        return 1024.0 * int(info.read_text().split("MemAvailable:")[1].split()[0])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_memory(config: RunConfig, device: torch.device, limit: float | None = None) -> None:
    """Raises RlhfImgError if a step needs more than `limit` bytes, by default what is free, with what would fit; before
    anything is loaded.

    A model whose weights take less than a hundredth of that is not looked at: counting takes seconds.
    """
    limit = limit if limit is not None else memory_of(device)
    sizes, dtype = sizes_of(config.model), run_dtype(config)
    if sum(weight_bytes(part, dtype) for part in sizes.parts().values()) < limit / 100:
        return
    gpu = device.type == "cuda"
    needed = estimate(config, sizes, dtype=dtype, gpu=gpu).peak
    if needed <= limit:
        return
    fits = what_fits(config, sizes, limit, dtype=dtype, gpu=gpu)
    advice = (
        f"{' '.join(changes(config, fits[0]))} needs {fits[1].peak / 2**30:.3g} GiB" if fits else
        "no batch is small enough: take a larger device or a smaller model"
    )  # fmt: skip
    raise RlhfImgError(
        f"a step of this run needs about {needed / 2**30:.3g} GiB, and {limit / 2**30:.3g} GiB of the {device.type} "
        f"are free: {advice}. `rlhf-img doctor --algorithm {algorithm_of(config)} --model {config.model}` shows what "
        "needs how much"
    )


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What differs, as key=value."""
    old, new = flat(to_mapping(before)), flat(to_mapping(after))
    return [f"{key}={str(value).lower()}" for key, value in new.items() if old[key] != value]


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
