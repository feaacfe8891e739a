"""A run of GRPO: its settings, its parts, and one iteration."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from rlhf_img.algorithms import grpo
from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import rollout
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.judges import COUNTS, accounted
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.vae import decode
from rlhf_img.rewards import Images, Reward, advantages, load_rewards, score
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics.scoring import RubricResult
from rlhf_img.training import distributed
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.adapters import begin_policy
from rlhf_img.training.config import RunConfig
from rlhf_img.training.loop import Clock, Job, open_model, train_and_heldout, watched_rewards
from rlhf_img.training.preflight import check_ratios
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.sentinels import diversity, image_statistics

_JOINT: dict[str, Callable[[list[float]], float]] = {"ratio/max_dev": max, "preflight/max_dev": max}
_JOINT |= dict.fromkeys(COUNTS, sum)
"""What several processes have in common of metrics that are no means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """A GRPO run. Every field can be set in a run file or as `key=value`, nested ones with dots: `grpo.lr=1e-4`."""

    start: str | None = None
    """The run, or the folder of a LoRA, whose adapter the policy goes on from, and which is its reference; None: the
    model itself. The adapter's size is kept, whatever `lora` says."""
    combine: str = "gdpo"
    """How rewards become one advantage: "gdpo" normalises each by its group first, "sum" adds them as they are."""
    max_unscored: float = 0.5
    """The run stops if a reward leaves more than this share of an iteration unscored."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        super(Config, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        if not 0 <= self.max_unscored <= 1:
            raise RlhfImgError(f"max_unscored is a share between 0 and 1; got {self.max_unscored}")

    def check_processes(self, count: int) -> None:
        """Raises RlhfImgError if `count` processes cannot share the work."""
        if self.grpo.prompts % count:
            raise RlhfImgError(
                f"grpo.prompts must be a multiple of the number of processes, {count}: groups are kept whole, and "
                f"shares equal; got {self.grpo.prompts}"
            )
        if self.grpo.updates > 1 and count > 1:
            raise RlhfImgError(
                "grpo.updates above 1 divides an iteration by batches, which differ between processes: use one, "
                "or one update and more iterations"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an iteration works with."""

    config: Config
    model: Model
    policy: Policy
    conditioner: Conditioner
    optimizer: torch.optim.Optimizer
    rewards: list[Reward]
    prompts: list[Prompt]


def prepare(config: Config) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any work."""
    config.check_processes(distributed.world())
    rewards = load_rewards(config.rewards)
    watched = watched_rewards(rewards, config)
    prompts, heldout = train_and_heldout(config)
    model = open_model(config)
    policy = begin_policy(model, config.lora, config.seed, start=config.start, full=config.full)
    (policy,) = distributed.shard(model, [policy], wanted=config.shard)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()), lr=config.grpo.lr, weight_decay=config.grpo.weight_decay
    )
    parts = Parts(
        config=config, model=model, policy=policy, conditioner=Conditioner(model), optimizer=optimizer,
        rewards=rewards, prompts=prompts,
    )  # fmt: skip
    job = Job(
        config=config, model=model, conditioner=parts.conditioner, trained={"policy": (policy, optimizer)},
        watched=watched, heldout_prompts=heldout, iterate=partial(iteration, parts),
    )  # fmt: skip
    return parts, job


def iteration(parts: Parts, step: int) -> dict[str, float]:
    """One iteration of GRPO: draw prompts, sample groups, score them, update the policy. Returns flat metrics."""
    config = parts.config
    clock = Clock()
    drawn = prompt_room.draw(parts.prompts, config.grpo.prompts, step - 1, config.seed)
    mine = distributed.share(len(drawn))
    sampled = rollout(
        parts.model, parts.policy, parts.conditioner, [p.text for p in drawn], config.grpo,
        _rollout_seed(config, step), mine,
    )  # fmt: skip
    deviation = check_ratios(parts.policy, sampled, config.grpo) if step == 1 else math.nan
    size = parts.model.default_size
    images = Images(decode(parts.model, sampled.latents(), size, size).detach().cpu())
    clock.lap("rollout")

    repeated = [drawn[i] for i in mine for _ in range(config.grpo.group)]
    with accounted() as judged:
        scores = score(
            parts.rewards, [p.text for p in repeated], images, {"rubrics": [p.rubric for p in repeated]},
            group_size=config.grpo.group, max_unscored=config.max_unscored,
        )  # fmt: skip
    values_PGK = distributed.gather_shares(scores.values_BK.unflatten(0, (len(mine), config.grpo.group)))
    gates = [(p.rubric or rubric_of(p.text)).gates for p in drawn]
    advantages_PG, metrics = advantages(parts.rewards, values_PGK, method=config.combine, prompt_gates=gates)
    advantages_B = advantages_PG[list(mine)].flatten().to(parts.model.device)
    clock.lap("reward")

    lr = config.grpo.lr * (1 - (step - 1) / config.steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    try:
        trained = grpo.update(
            parts.policy, parts.optimizer, sampled, advantages_B, config.grpo, distributed.average_gradients
        )
    except FloatingPointError as error:
        raise RunStopped(
            f"iteration {step}: {error}. The last checkpoint stays; go on from it with --resume and a lower grpo.lr, "
            "or look at the rewards of this iteration in metrics.jsonl"
        ) from error
    clock.lap("train")
    seen = {f"sentinel/{name}": value for name, value in image_statistics(images.tensor).items()}
    seen["sentinel/diversity"] = float(diversity(images.tensor.unflatten(0, (len(mine), -1))).mean())
    first = {} if math.isnan(deviation) else {"preflight/max_dev": deviation}
    own = {**trained, **judged, **seen, **first, **clock.times()}
    common = {**_renamed(metrics), **_rubric_metrics(scores.details)}
    return {**distributed.joint_metrics(own, _JOINT), **common, "lr": lr}


def _rollout_seed(config: RunConfig, step: int) -> int:
    """Distinct for every run seed, iteration and image (an iteration uses the numbers that follow)."""
    return (config.seed * 100_003 + step) * 100_000


def _renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    names = {"tie_rate": "ties", "advantage_std": "advantage/std"}
    return {names.get(name, name): value for name, value in metrics.items()}


def _rubric_metrics(details: Mapping[str, tuple[object, ...]]) -> dict[str, float]:
    results = [r for r in details.get("rubric", ()) if isinstance(r, RubricResult)]
    passed = _everywhere([r.passed for r in results])
    single = _everywhere([requirement.passed for r in results for requirement in r.requirements])
    if not passed:
        return {}
    return {"rubric/pass_all": sum(passed) / len(passed), "rubric/pass_requirement": sum(single) / len(single)}


def _everywhere(verdicts: list[bool | None]) -> list[bool]:
    """The verdicts of all processes, without those left open."""
    return [verdict for part in distributed.gather(verdicts) for verdict in part if verdict is not None]
