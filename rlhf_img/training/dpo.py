"""A run of preference optimisation: its settings, its parts, and one iteration."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_img.algorithms import dpo
from rlhf_img.algorithms.dpo import DPOConfig, NoisedPairs, PairErrors
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import PLAYGROUND, Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.sharding import is_sharded
from rlhf_img.model.vae import encode
from rlhf_img.rewards import Images, load_rewards
from rlhf_img.training import distributed
from rlhf_img.training import pairs as pair_room
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.adapters import begin_policy
from rlhf_img.training.config import RunConfig
from rlhf_img.training.loop import Clock, Job, open_model, watched_rewards
from rlhf_img.training.pairs import Pair
from rlhf_img.training.prompts import Prompt

_HELDOUT_SEED = 0
"""Of which pairs are held out and how they are noised; the same for every run, so that runs compare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """A run on preference pairs. Every field can be set in a run file or as `key=value`, nested ones with dots."""

    pairs: str | None = None
    """A Parquet file of preference pairs, or a folder of them; see docs/preference-optimisation.md."""
    columns: str | None = None
    """Other names of its columns: "prompt=caption,image_0=jpg_0,image_1=jpg_1,prefers_0=label_0"."""
    max_bad: float = 0.1
    """The run is refused if more than this share of the pairs cannot be used."""
    start: str | None = None
    """The run, or the folder of a LoRA, whose adapter the policy goes on from, and which is its reference; None: the
    model itself. The adapter's size is kept, whatever `lora` says."""
    steps: int = 100
    """Iterations."""
    heldout_pairs: int = 128
    """Pairs that are measured and not trained on, of prompts of their own; at most a fifth of all."""
    measure_every: int = 10
    """Iterations between measurements of the held-out pairs."""
    max_winner_rise: float | None = 0.25
    """The run stops if the held-out winners' error rises above the reference's by more than this share; null: never."""
    dpo: DPOConfig = field(default_factory=DPOConfig)

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        super(Config, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        if not 0 <= self.max_bad <= 1:
            raise RlhfImgError(f"max_bad is a share between 0 and 1; got {self.max_bad}")
        if min(self.heldout_pairs, self.measure_every) < 1:
            raise RlhfImgError("heldout_pairs and measure_every must be 1 or more")

    def check_processes(self, count: int) -> None:
        """Raises RlhfImgError if `count` processes cannot share the work."""
        distributed.check_shares("dpo.pairs", self.dpo.pairs, count)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPair:
    """A pair as the transformer learns from it: clean latents on the CPU."""

    prompt: str
    winner_NC: Tensor
    loser_NC: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an iteration works with."""

    config: Config
    model: Model
    policy: Policy
    conditioner: Conditioner
    optimizer: torch.optim.Optimizer
    pairs: list[EncodedPair]
    lengths_N: np.ndarray
    """Of their prompts, in tokens."""
    heldout: list[EncodedPair]
    beta: float
    """`beta_mean`, given or measured."""


def prepare(config: Config) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any training."""
    config.check_processes(distributed.world())
    if config.pairs is None:
        raise RlhfImgError("preference optimisation needs pairs: give --pairs DATA; `rlhf-img pairs make` makes some")
    columns = pair_room.parse_columns(config.columns)
    found = pair_room.survey(Path(config.pairs), columns, max_bad=config.max_bad)
    watched = watched_rewards(load_rewards(config.rewards), config)
    model = open_model(config)
    policy = begin_policy(model, config.lora, config.seed, start=config.start, full=config.full)
    (policy,) = distributed.shard(model, [policy], wanted=config.shard)
    train, heldout = split(_encoded(model, pair_room.read_pairs(Path(config.pairs), columns)), config.heldout_pairs)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()), lr=config.dpo.lr, weight_decay=config.dpo.weight_decay
    )
    conditioner = Conditioner(model, store=config.compute.text_store)
    lengths_N = conditioner.lengths([pair.prompt for pair in train])
    beta = config.dpo.beta_mean or _measured_beta(config, model, policy, conditioner, train, lengths_N, heldout)
    parts = Parts(
        config=config, model=model, policy=policy, conditioner=conditioner, optimizer=optimizer, pairs=train,
        lengths_N=lengths_N, heldout=heldout, beta=beta,
    )  # fmt: skip
    dimensions = train[0].winner_NC.numel()
    measured = "" if config.dpo.beta_mean else f", measured in {config.dpo.calibration_steps} trial steps"
    job = Job(
        config=config, model=model, conditioner=conditioner, trained={"policy": (policy, optimizer)}, watched=watched,
        heldout_prompts=_heldout_prompts(config, heldout), iterate=partial(iteration, parts),
        texts=tuple(pair.prompt for pair in train + heldout),
        notes=(
            *found.lines(),
            f"beta: {beta:.4g} on errors averaged over dimensions, {beta / dimensions:.3g} on their sum{measured}",
        ),
    )  # fmt: skip
    return parts, job


def iteration(parts: Parts, step: int) -> dict[str, float]:
    """One iteration: draw pairs and noise, update the policy, now and then measure. Returns flat metrics."""
    config, clock = parts.config, Clock()
    lr = config.dpo.lr * (1 - (step - 1) / config.steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    drawn = _drawn(config, parts.pairs, parts.lengths_N, step)
    batches = _batches(config, parts.model, parts.conditioner, drawn, _seed(config, step))
    clock.lap("data")
    try:
        trained = dpo.update(
            parts.policy, parts.optimizer, batches, parts.beta, config.dpo,
            average_gradients=distributed.average_gradients,
        )  # fmt: skip
    except FloatingPointError as error:
        raise RunStopped(
            f"iteration {step}: {error}. The last checkpoint stays; go on from it with --resume, or start again with a "
            "lower dpo.lr"
        ) from error
    parts.policy.update_average(config.dpo.ema)
    clock.lap("train")
    seen = {}
    if step % config.measure_every == 0 or step == config.steps:
        seen = measured(parts)
        _stop_if_diverged(config, step, seen)
    clock.lap("measure")
    dimensions = parts.pairs[0].winner_NC.numel()
    common = dpo.with_rises(distributed.joint_metrics({**trained, **clock.times()}, {}))
    return {**common, **seen, "lr": lr, "beta_mean": parts.beta, "beta_sum": parts.beta / dimensions}


def measured(parts: Parts) -> dict[str, float]:
    """Errors of the held-out pairs at fixed noise, as `heldout/...`."""
    batches = _batches(parts.config, parts.model, parts.conditioner, parts.heldout, _HELDOUT_SEED)
    errors = _gathered(dpo.measure(parts.policy, batches, parts.config.dpo))
    means = dpo.with_rises(dpo.describe(errors, parts.beta))
    return {name.replace("pairs/", "heldout/"): value for name, value in means.items()}


def _gathered(errors: PairErrors) -> PairErrors:
    """Those of all processes' pairs."""
    return dpo.joined(distributed.gather(errors))


def _encoded(model: Model, pairs: Iterable[Pair]) -> list[EncodedPair]:
    """`encode_pairs` with the work shared by all processes."""
    every = distributed.gather(encode_pairs(model, islice(pairs, distributed.rank(), None, distributed.world())))
    return [every[i % len(every)][i // len(every)] for i in range(sum(map(len, every)))]


def encode_pairs(model: Model, pairs: Iterable[Pair], *, at_once: int = 32) -> list[EncodedPair]:
    """Latents of every pair, in order. Raises RlhfImgError for a size that is no multiple of the model's token."""
    done: list[EncodedPair] = []
    waiting: list[Pair] = []

    def flush() -> None:
        by_size = defaultdict(list)
        for place, pair in enumerate(waiting):
            by_size[pair.images()[0].size].append(place)
        latents: dict[int, EncodedPair] = {}
        for (width, height), places in by_size.items():
            images = Images.from_pil([image for place in places for image in waiting[place].images()])
            x_BNC = encode(model, images.tensor.to(model.device)).cpu()
            for place, (winner, loser) in zip(places, x_BNC.unflatten(0, (-1, 2)), strict=True):
                latents[place] = EncodedPair(
                    prompt=waiting[place].prompt, winner_NC=winner, loser_NC=loser, grid=model.grid(height, width)
                )
        done.extend(latents[place] for place in range(len(waiting)))
        waiting.clear()

    with torch.no_grad():
        for pair in pairs:
            waiting.append(pair)
            if len(waiting) == at_once:
                flush()
        flush()
    return done


def split(pairs: list[EncodedPair], heldout: int) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Training and held-out pairs, without a prompt in common; the latter as many as asked, at most a fifth.

    Raises RlhfImgError if there are too few prompts.
    """
    sizes = Counter(pair.prompt for pair in pairs)
    prompts = list(sizes)
    wanted, chosen, count = min(heldout, len(pairs) // 5), set[str](), 0
    for i in np.random.default_rng(_HELDOUT_SEED).permutation(len(prompts)):
        if count >= wanted:
            break
        chosen.add(prompts[i])
        count += sizes[prompts[i]]
    train = [pair for pair in pairs if pair.prompt not in chosen]
    if not chosen or not train:
        raise RlhfImgError(f"{len(pairs)} pairs of {len(prompts)} prompts are too few: some are held out to measure by")
    return train, [pair for pair in pairs if pair.prompt in chosen]


def _measured_beta(
    config: Config, model: Model, policy: Policy, conditioner: Conditioner, train: list[EncodedPair],
    lengths_N: np.ndarray, heldout: list[EncodedPair],
) -> float:  # fmt: skip
    trial = [
        _batches(config, model, conditioner, _drawn(config, train, lengths_N, step), _seed(config, step))
        for step in range(1, config.dpo.calibration_steps + 1)
    ]
    try:
        return dpo.calibrated_beta(
            policy, trial, _batches(config, model, conditioner, heldout, _HELDOUT_SEED), config.dpo,
            distributed.average_gradients, _gathered,
        )  # fmt: skip
    except FloatingPointError as error:
        raise RunStopped(f"beta cannot be measured: {error}. Give dpo.beta_mean, or a lower dpo.lr") from error


def _heldout_prompts(config: Config, heldout: list[EncodedPair]) -> list[Prompt]:
    if config.eval_prompts is not None:
        found = prompt_room.read_prompts(Path(config.eval_prompts))
    elif config.model == PLAYGROUND:
        found = prompt_room.from_playground("heldout", config.eval.prompts)
    else:
        found = [Prompt(text) for text in dict.fromkeys(pair.prompt for pair in heldout)]
    return found[: config.eval.prompts]


def _drawn(config: Config, pairs: list[EncodedPair], lengths_N: np.ndarray, step: int) -> list[EncodedPair]:
    return [pairs[i] for i in prompt_room.turns(lengths_N, config.dpo.pairs, step - 1, config.seed)]


def _seed(config: Config, step: int) -> int:
    """Of the noise of an iteration; distinct for every run seed and iteration, and not that of held-out pairs."""
    return config.seed * 100_003 + step


def _batches(
    config: Config, model: Model, conditioner: Conditioner, pairs: Sequence[EncodedPair], seed: int
) -> list[NoisedPairs]:
    """This process's share of pairs noised to `draws` levels each, those of one prompt length and size together; of a
    sharded transformer each by itself, see `model.forward.in_batches`."""
    generator = torch.Generator().manual_seed(seed)
    low, width, draws = config.dpo.min_sigma, config.dpo.max_sigma - config.dpo.min_sigma, config.dpo.draws
    shares = (torch.arange(draws)[:, None] + torch.rand(draws, len(pairs), generator=generator)) / draws
    noise = [torch.randn((draws, *pair.winner_NC.shape), generator=generator) for pair in pairs]
    mine = distributed.share(len(pairs))
    texts = dict(zip(mine, conditioner.encode([pairs[i].prompt for i in mine]), strict=True))
    apart = is_sharded(model.transformer)
    groups = defaultdict(list)
    for i in mine:
        groups[(pairs[i].grid, len(texts[i]), i if apart else 0)].append(i)

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)).to(model.device)

    return [
        dpo.noised(
            stacked([pairs[i].winner_NC.expand(draws, -1, -1) for i in rows]),
            stacked([pairs[i].loser_NC.expand(draws, -1, -1) for i in rows]),
            stacked([texts[i].expand(draws, -1, -1) for i in rows]),
            stacked([low + width * shares[:, i] for i in rows]),
            stacked([noise[i] for i in rows]),
            grid,
        )
        for (grid, *_), rows in sorted(groups.items())
    ]


def _stop_if_diverged(config: Config, step: int, seen: Mapping[str, float]) -> None:
    rise = seen["heldout/winner_rise"]
    if config.max_winner_rise is not None and not rise <= config.max_winner_rise:
        raise RunStopped(
            f"iteration {step}: the held-out winners' error is {rise:+.0%} against the reference's, and at most "
            f"{config.max_winner_rise:+.0%} is borne (max_winner_rise): the model leaves its distribution. Take an "
            "STPO loss, a lower dpo.lr or a larger dpo.beta_mean, or allow more"
        )
