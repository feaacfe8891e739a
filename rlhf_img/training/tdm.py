"""A run of TDM: its settings, its teacher, its parts, and one iteration."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_img.algorithms import tdm
from rlhf_img.algorithms.tdm import TDMConfig
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model
from rlhf_img.model.lora import role
from rlhf_img.model.policy import POLICY, Policy, make_full, make_role
from rlhf_img.rewards import load_rewards
from rlhf_img.training import distributed
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.adapters import load_frozen
from rlhf_img.training.card import controls, report_card
from rlhf_img.training.config import RunConfig
from rlhf_img.training.evaluate import EvalConfig
from rlhf_img.training.likeness import ARTIFACT, Features, open_features
from rlhf_img.training.loop import Clock, Job, open_model, train_and_heldout, watched_rewards
from rlhf_img.training.panel import Panel, PanelConfig, means_of
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.samples import draw_images
from rlhf_img.training.watch import SentinelConfig

TEACHER, CRITIC = "teacher", "critic"
"""Roles beside the student, which is the policy: what is measured and exported."""
INHERITED = ("model", "prompts", "eval_prompts", "rewards")
"""What a distillation takes over from the run of its teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentEvalConfig(EvalConfig):
    """How the student is measured: with its own number of steps, and without guidance."""

    num_steps: int = 8
    """Denoising steps: those of tdm.num_steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """A TDM run. Every field can be set in a run file or as `key=value`, nested ones with dots: `tdm.guidance=3`.

    `rewards` measure, and do not train. With a teacher, student and critic have the size of its adapter, not `lora`.
    With `full` they are all weights of the blocks, in two copies of the transformer, and want lower rates.
    """

    teacher: str | None = None
    """The run, or the folder of a LoRA, that aligned the model; None: the model itself is the teacher."""
    steps: int = 60
    checkpoint_every: int = 25
    sample_every: int = 50
    card: bool = True
    """Measure the controls of the report card once training is done: the teacher in three ways, and Raw."""
    full_steps: int = 16
    """Steps of the teacher's full sampling on the card. Krea 2 Raw's own default is 28."""
    features: str | None = None
    """In what the card measures the distance to the teacher's images: "artifact", or a hub id or folder of SigLIP or
    DINO; None: "artifact" for images of 32 to 128 px, and for others it is not measured."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    eval: StudentEvalConfig = field(default_factory=StudentEvalConfig)
    sentinels: SentinelConfig = field(default_factory=lambda: SentinelConfig(stop=None))
    """Against the guided teacher at full steps, from which an untrained student is far: they warn only."""
    tdm: TDMConfig = field(default_factory=TDMConfig)

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that do not fit the student."""
        super(Config, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        if self.full_steps < 1:
            raise RlhfImgError(f"full_steps must be 1 or more; got {self.full_steps}")
        if (self.eval.num_steps, self.eval.guidance) != (self.tdm.num_steps, 0.0):
            raise RlhfImgError(
                f"the student is made for {self.tdm.num_steps} steps (tdm.num_steps) without guidance, and would be "
                f"measured at {self.eval.num_steps} with guidance {self.eval.guidance}: set eval.num_steps to "
                "tdm.num_steps and leave eval.guidance 0"
            )

    def check_processes(self, count: int) -> None:
        """Raises RlhfImgError if `count` processes cannot share the work."""
        distributed.check_shares("tdm.prompts", self.tdm.prompts, count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What an iteration works with."""

    config: Config
    model: Model
    student: Policy
    critic: Policy
    conditioner: Conditioner
    optimizers: dict[str, torch.optim.Optimizer]
    prompts: list[Prompt]
    lengths_N: np.ndarray
    """Of the prompts, in tokens."""


def prepare(config: Config) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any work."""
    config.check_processes(distributed.world())
    watched = watched_rewards(load_rewards(config.rewards), config)
    prompts, heldout = train_and_heldout(config)
    model = open_model(config)
    if model.is_distilled and config.tdm.guidance > 0:
        raise RlhfImgError(
            f'the teacher "{config.model}" is distilled already and draws without guidance: tdm.guidance='
            f"{config.tdm.guidance:g} on top would destroy its detail; give the model it was distilled from, such as "
            "krea/Krea-2-Raw, or set tdm.guidance=0"
        )
    if config.teacher is not None:
        load_frozen(model, Path(config.teacher), TEACHER)
    start = None if config.teacher is None else TEACHER
    student, critic = (
        make_full(model.transformer, name, start=start) if config.full
        else make_role(model.transformer, name, config.lora, config.seed + i, start=start)
        for i, name in enumerate((POLICY, CRITIC))
    )
    student, critic = distributed.shard(model, [student, critic], wanted=config.shard)
    optimizers: dict[str, torch.optim.Optimizer] = {
        role.name: torch.optim.AdamW(list(role.parameters.values()), lr=lr, weight_decay=config.tdm.weight_decay)
        for role, lr in ((student, config.tdm.lr), (critic, config.tdm.critic_lr))
    }
    # From here on the model is sampled as the student will be: at the levels of a distilled checkpoint.
    shipped = dataclasses.replace(model, transformer=student.transformer, is_distilled=True)
    conditioner = Conditioner(model, store=config.compute.text_store)
    panel, prompts = set_aside(config, model, shipped, conditioner, student, start, prompts)
    parts = Parts(
        config=config, model=shipped, student=student, critic=critic, conditioner=conditioner,
        optimizers=optimizers, prompts=prompts, lengths_N=conditioner.lengths([prompt.text for prompt in prompts]),
    )  # fmt: skip
    job = Job(
        config=config, model=shipped, conditioner=parts.conditioner,
        trained={role.name: (role, optimizers[role.name]) for role in (student, critic)}, watched=watched,
        heldout_prompts=heldout, iterate=partial(iteration, parts), panel=panel,
        raw=partial(_teacher_images, config, model, conditioner, start),
        texts=tuple(prompt.text for prompt in prompts),
    )  # fmt: skip
    if config.card:
        against = controls(model, start, config.tdm.num_steps, config.full_steps, config.tdm.guidance)
        features = _features(config, model)
        job = dataclasses.replace(job, card=lambda run, drawn, after, console: report_card(
            job, run, against, features, drawn, after, console
        ))  # fmt: skip
    return parts, job


def set_aside(
    config: Config, model: Model, shipped: Model, conditioner: Conditioner, student: Policy, start: str | None,
    prompts: list[Prompt],
) -> tuple[Panel | None, list[Prompt]]:  # fmt: skip
    """The validation panel, whose rewards count up to the guided teacher's, and the prompts that are left for training;
    of fewer than 5 all are for both."""
    if not config.panel.every:
        return None, prompts
    count = min(config.panel.prompts, len(prompts) // 5)

    @cache
    def teachers() -> dict[str, float]:
        with role(model.transformer, start):
            return means_of(panel.draw(model, config.full_steps, config.tdm.guidance))

    panel = Panel(
        config=config.panel, model=shipped, conditioner=conditioner, policy=student,
        rewards=[r for r in load_rewards(config.rewards) if r.role != "measure"],
        prompts=prompts[:count] or prompts[: config.panel.prompts], settings=config.eval, at_most=teachers,
        begins=config.tdm.warmup,
    )  # fmt: skip
    return panel, prompts[count:]


def _teacher_images(
    config: Config, model: Model, conditioner: Conditioner, teacher: str | None, prompts: Sequence[Prompt],
    seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    with role(model.transformer, teacher):
        return draw_images(
            model, conditioner, prompts, seeds, num_steps=config.full_steps, guidance=config.tdm.guidance
        )


def _features(config: Config, model: Model) -> Features | None:
    if config.features is None and not 32 <= model.default_size <= 128:
        return None
    return open_features(config.features or ARTIFACT)


def iteration(parts: Parts, step: int) -> dict[str, float]:
    """One iteration of TDM: the student draws, the critic learns what it draws, the student moves. Flat metrics."""
    config = parts.config
    clock = Clock()
    turn = prompt_room.turns(parts.lengths_N, config.tdm.prompts, step - 1, config.seed)
    drawn = [parts.prompts[i] for i in turn]
    seed = (config.seed * 100_003 + step) * 100_000  # an image's is this and its place
    sampled = tdm.rollout(
        parts.model, parts.student, parts.conditioner, [p.text for p in drawn], config.tdm, seed,
        distributed.share(len(drawn)),
    )  # fmt: skip
    clock.lap("rollout")
    generator = torch.Generator().manual_seed(seed)
    lr = config.tdm.lr_at(step, config.steps)
    for name, rate in ((POLICY, lr), (CRITIC, config.tdm.critic_lr * (1 - (step - 1) / config.steps))):
        for group in parts.optimizers[name].param_groups:
            group["lr"] = rate
    try:
        learnt: dict[str, float] = {}
        moved: dict[str, float] = {}
        shared = sampled, config.tdm, generator, distributed.average_gradients
        for _ in range(config.tdm.critic_updates):
            learnt = tdm.train_critic(parts.critic, parts.optimizers[CRITIC], *shared)
        if step > config.tdm.warmup:
            moved = tdm.train_student(parts.student, parts.critic, parts.optimizers[POLICY], *shared)
        else:
            for _ in range(config.tdm.warmup_updates):
                moved = tdm.teach_guidance(parts.student, parts.optimizers[POLICY], *shared)
    except FloatingPointError as error:
        raise RunStopped(
            f"iteration {step}: {error}. The last checkpoint stays; start again with a lower "
            f"{'tdm.warmup_lr' if step <= config.tdm.warmup else 'tdm.lr'} and tdm.critic_lr"
        ) from error
    clock.lap("train")
    return {**distributed.joint_metrics({**moved, **learnt, **clock.times()}, {}), "lr": lr}
