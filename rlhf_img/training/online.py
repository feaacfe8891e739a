"""What runs of online algorithms share: settings, parts, and one iteration of drawing, scoring and learning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.nft import NFTConfig
from rlhf_img.algorithms.rollout import Batch, Rollout, noised, rollout
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.judges import COUNTS, accounted
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.vae import decode
from rlhf_img.rewards import Images, Reward, Scoring, advantages, extremes, load_rewards
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics.scoring import RubricResult
from rlhf_img.training import distributed
from rlhf_img.training.adapters import begin_policy
from rlhf_img.training.config import RunConfig
from rlhf_img.training.loop import Clock, Job, open_model, train_and_heldout, watched_rewards
from rlhf_img.training.pool.run import PromptPool, pool_of
from rlhf_img.training.pool.weights import PoolConfig

_JOINT: dict[str, Callable[[list[float]], float]] = {"ratio/max_dev": max, "preflight/max_dev": max}
_JOINT |= dict.fromkeys(COUNTS, sum)
"""What several processes have in common of metrics that are no means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineConfig(RunConfig):
    """A run that learns from rewards of images that it draws."""

    start: str | None = None
    """The run, or the folder of a LoRA, whose adapter the policy goes on from, and which is its reference; None: the
    model itself. The adapter's size is kept, whatever `lora` says."""
    combine: str = "gdpo"
    """How rewards become one advantage: "gdpo" normalises each by its group first, "sum" adds them as they are."""
    max_unscored: float = 0.5
    """The run stops if a reward leaves more than this share of an iteration unscored."""
    pool: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        super(OnlineConfig, self).__post_init__()  # a dataclass with slots is not what a bare super() knows
        if not 0 <= self.max_unscored <= 1:
            raise RlhfImgError(f"max_unscored is a share between 0 and 1; got {self.max_unscored}")

    @property
    def method(self) -> GRPOConfig | NFTConfig:
        """The settings of the algorithm."""
        raise NotImplementedError

    def check_processes(self, count: int) -> None:
        """Raises RlhfImgError if `count` processes cannot share the work."""
        name, method = self.method.section, self.method
        if method.prompts % count:
            raise RlhfImgError(
                f"{name}.prompts must be a multiple of the number of processes, {count}: groups are kept whole, and "
                f"shares equal; got {method.prompts}"
            )
        if method.updates > 1 and count > 1:
            raise RlhfImgError(
                f"{name}.updates above 1 divides an iteration by batches, which differ between processes: use one, "
                "or one update and more iterations"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an iteration works with."""

    config: OnlineConfig
    model: Model
    policy: Policy
    conditioner: Conditioner
    optimizer: torch.optim.Optimizer
    rewards: list[Reward]
    pool: PromptPool


Learn = Callable[[Parts, Rollout, Tensor, int], dict[str, float]]
"""One iteration, counted from 1, of learning from images and their advantages [B]; returns flat metrics."""


def prepare(config: OnlineConfig, learn: Learn) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any work."""
    config.check_processes(distributed.world())
    rewards = load_rewards(config.rewards)
    watched = watched_rewards(rewards, config)
    prompts, heldout = train_and_heldout(config)
    model = open_model(config)
    policy = begin_policy(model, config.lora, config.seed, start=config.start, full=config.full)
    (policy,) = distributed.shard(model, [policy], wanted=config.shard)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()), lr=config.method.lr, weight_decay=config.method.weight_decay
    )
    conditioner = Conditioner(model, store=config.compute.text_store)
    lengths_N = conditioner.lengths([prompt.text for prompt in prompts])
    parts = Parts(
        config=config, model=model, policy=policy, conditioner=conditioner, optimizer=optimizer, rewards=rewards,
        pool=PromptPool(prompts, config.pool, config.seed, pool_of(config), lengths_N),
    )  # fmt: skip
    job = Job(
        config=config, model=model, conditioner=parts.conditioner, trained={"policy": (policy, optimizer)},
        watched=watched, heldout_prompts=heldout, iterate=partial(iteration, parts, learn), pool=parts.pool,
        rewards=tuple(rewards), texts=tuple(prompt.text for prompt in prompts),
    )  # fmt: skip
    return parts, job


def iteration(parts: Parts, learn: Learn, step: int) -> dict[str, float]:
    """One iteration: draw prompts, sample groups, score them, learn. Returns flat metrics."""
    config, method = parts.config, parts.config.method
    clock = Clock()
    drawn = parts.pool.draw(step, method.prompts)
    mine = distributed.share(len(drawn))
    repeated = [drawn[i] for i in mine for _ in range(method.group)]
    with accounted() as judged, Scoring(
        parts.rewards, len(repeated), [p.text for p in repeated], {"rubrics": [p.rubric for p in repeated]},
        group_size=method.group,
    ) as scoring:  # fmt: skip
        sampled = rollout(
            parts.model, parts.policy, parts.conditioner, [p.text for p in drawn], method,
            _rollout_seed(config, step), mine, lambda batch: scoring.add(batch.rows_B, _decoded(parts.model, batch)),
        )  # fmt: skip
        clock.lap("rollout")
        scores = scoring.result(max_unscored=config.max_unscored)
    images = scoring.images
    values_PGK = distributed.gather_shares(scores.values_BK.unflatten(0, (len(mine), method.group)))
    gates = [(p.rubric or rubric_of(p.text)).gates for p in drawn]
    noise = parts.pool.measure_noise(parts.rewards, repeated[0], images[: method.group]) if step == 1 else {}
    advantages_PG, metrics = advantages(
        parts.rewards, values_PGK, method=config.combine, prompt_gates=gates, noise=parts.pool.noise
    )
    metrics |= parts.pool.record(step, parts.rewards, values_PGK, gates)
    advantages_B, kept_B = (x.flatten() for x in extremes(advantages_PG[list(mine)], method.trained))
    clock.lap("reward")

    try:
        trained = learn(parts, noised(parts.policy, sampled, method, kept_B), advantages_B.to(parts.model.device), step)
    except FloatingPointError as error:
        raise RunStopped(
            f"iteration {step}: {error}. The last checkpoint stays; go on from it with --resume and a lower "
            f"{method.section}.lr, or look at the rewards of this iteration in metrics.jsonl"
        ) from error
    clock.lap("train")
    own = {**trained, **judged, **noise, **clock.times()}
    common = {**_renamed(metrics), **_rubric_metrics(scores.details)}
    return {**distributed.joint_metrics(own, _JOINT), **common, "lr": method.lr}


def _decoded(model: Model, batch: Batch) -> Images:
    return Images(decode(model, batch.final_BNC, model.default_size, model.default_size).detach().cpu())


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
