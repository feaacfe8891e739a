"""TDM: distil a guided flow model into a student of few steps without guidance, from prompts alone.

Trajectory Distribution Matching (arXiv 2503.06674) for a flow x_t = (1 - t) x0 + t eps, v = eps - x0. The student walks
the grid 1 = s_0 > ... > s_K = 0 of the sampler that ships, by Euler steps. In each stage k, what it lands on,

    x_s = x_{s_k} + (s_{k+1} - s_k) v_student,  noised forward to x_tau = a x_s + b n  with s = s_{k+1} < tau < s_k,
    a = (1 - tau) / (1 - s),  b^2 = tau^2 - a^2 s^2,

shall be distributed as the teacher's flow is at tau (a reverse KL). Its gradient is the difference of two scores at
x_tau: the teacher's, and that of the student's own law, which a second network, the critic, learns as it moves.
With x0 = x_{s_k} - s_k v_student, the one term of a stage that is evaluated with a graph, and x0_m = x_tau - tau v_m,

    student:  mean |x0 - stop(x0 + DM + CA)|^2 / norm,    DM = x0_teacher - x0_critic,
              CA = g (x0_teacher - x0_teacher(empty prompt)),    norm = mean |x0 - (x0_teacher + CA)| of an image
    critic:   w mean |v_critic(x_tau, tau) - v*|^2

Stages do not overlap, so tau says which stage's law is meant and one critic serves all: algorithms/stages.py.

g is Krea's, v + g (v - v_empty): the published scale is w = 1 + g. Student, critic and teacher are roles over one base.

What we added: the first iterations (`warmup`) teach the student by regression on its own way from noise to image, while
the critic learns as always: mean |v_student - v*|^2, where v* leads to where the guided teacher gets from there to the
stage's end in `warmup_substeps` steps (guidance distillation, arXiv 2210.03142; progressive distillation, 2202.00512).
The target has no noise of a critic in it, and matching of laws then begins close to where it ends.

Left out: the published importance weight (tempered by the number of dimensions it stays within a few per cent of 1),
landing between grid points, conditioning on the number of steps (it would add weights that a stock pipeline drops).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.algorithms.rollout import AverageGradients, alone, require
from rlhf_img.algorithms.stages import CRITIC_TARGETS, Landing, Noised, Stages, draw_stages, land, wide
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import euler_step, sigmas
from rlhf_img.model.forward import in_batches, velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.sampling import initial_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class TDMConfig:
    """Settings of TDM."""

    prompts: int = 32
    """Prompts an iteration."""
    images: int = 2
    """Images of each of them; they share a forward."""
    num_steps: int = 8
    """K, the student's steps. It is made for this number alone."""
    guidance: float = 1.0
    """Krea's g of the teacher, which the student learns to do without; the common scale w is 1 + g."""
    warmup: int = 40
    """Iterations at the start in which the student learns by regression alone: the guided teacher's way, from where the
    student itself comes along. 0: none."""
    warmup_substeps: int = 2
    """Steps of the guided teacher in a stage, which the student learns to make in one."""
    warmup_updates: int = 8
    """Optimiser steps of the student in each of them, on stages of its own: drawing costs as much as three of them."""
    critic_target: Literal["ambient", "tdm_x0", "dmd"] = "ambient"
    """What the critic learns: the exact score of what the student lands on, or one of two published stand-ins."""
    critic_updates: int = 2
    """Optimiser steps of the critic an iteration, each on stages and noise of its own; the student takes one."""
    loss: Literal["mse", "huber"] = "mse"
    """Squared error, or pseudo-Huber, which pays linearly for what is far off."""
    huber_c: float = 1e-3
    """huber: the error of an element at which it turns from square to linear."""
    margin: float = 0.02
    """How far tau stays from both ends of its stage, as a share of the stage's width."""
    norm_floor: float = 1e-3
    """Least value of the normaliser."""
    warmup_lr: float = 2e-3
    """The student's learning rate (AdamW) at the start; it falls linearly to 0 over the warm-up."""
    lr: float = 2e-4
    """The student's afterwards; it falls linearly to 0 over what is left."""
    critic_lr: float = 1e-3
    """The critic's, which falls linearly to 0 over the run."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients of each are clipped to this norm."""
    ema: float = 0.95
    """Decay, an optimiser step, of the student's averaged weights."""
    batch_size: int = 64
    """Images a forward, at most."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        counts = (self.prompts, self.images, self.num_steps, self.warmup_substeps, self.warmup_updates,
                  self.critic_updates, self.batch_size)  # fmt: skip
        require(
            {
                "tdm.prompts, tdm.images, tdm.num_steps, tdm.warmup_substeps, tdm.warmup_updates, tdm.critic_updates "
                "and tdm.batch_size must be 1 or more": min(counts) >= 1,
                "tdm.warmup must be 0 or more": self.warmup >= 0,
                "tdm.guidance is Krea's g, 0 (off) or more; the common scale w is 1 + g": self.guidance >= 0,
                "tdm.margin is a share of a stage at each end, above 0 and below 0.5": 0 < self.margin < 0.5,
                "tdm.lr, tdm.warmup_lr, tdm.critic_lr, tdm.norm_floor and tdm.huber_c must be above 0":
                    min(self.lr, self.warmup_lr, self.critic_lr, self.norm_floor, self.huber_c) > 0,
                "tdm.ema must lie between 0 and 1, 1 excluded": 0 <= self.ema < 1,
            },
            self,
        )  # fmt: skip

    def lr_at(self, iteration: int, last: int) -> float:
        """The student's learning rate at an iteration, counted from 1, of a run of `last`."""
        if iteration <= self.warmup:
            return self.warmup_lr * (1 - (iteration - 1) / self.warmup)
        return self.lr * (1 - (iteration - 1 - self.warmup) / (last - self.warmup))


def student_grid(model: Model, num_steps: int) -> Float[Tensor, "{num_steps}+1"]:
    """The noise levels that a distilled model is sampled at: the stock pipeline's for `is_distilled=True`."""
    rows, columns = model.grid(model.default_size, model.default_size)
    return sigmas(num_steps, rows * columns, model.scheduler.config, is_distilled=True)


def critic_loss(v_BNC: Float[Tensor, "B N C"], noised: Noised) -> Float[Tensor, " B"]:
    """w mean |v - v*|^2, per sample."""
    return noised.weight_B * (v_BNC - noised.target_BNC).square().flatten(1).mean(1)


def student_loss(
    x0_BNC: Float[Tensor, "B N C"], x_tau_BNC: Float[Tensor, "B N C"], tau_B: Float[Tensor, " B"],
    v_teacher_BNC: Float[Tensor, "B N C"], v_empty_BNC: Float[Tensor, "B N C"], v_critic_BNC: Float[Tensor, "B N C"],
    config: TDMConfig,
) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:  # fmt: skip
    """Loss per sample, of which `x0` alone carries a gradient, and per-sample metrics without one.

    Args:
        x0_BNC: the clean image that the student predicts from its stage's start.
        x_tau_BNC, tau_B: its landing, noised, and the level.
        v_teacher_BNC, v_empty_BNC, v_critic_BNC: velocities there, of the teacher with the prompt and with the empty
            one, unguided, and of the critic. `v_empty` is not used where guidance is 0.

    Metrics: `loss`, `dm` and `guidance`, the root mean squares of the two terms, and `norm`.
    """
    tau, x0 = wide(tau_B, x0_BNC), x0_BNC.float()
    with torch.no_grad():
        teacher = x_tau_BNC.float() - tau * v_teacher_BNC.float()
        dm = tau * (v_critic_BNC.float() - v_teacher_BNC.float())
        ca = config.guidance * tau * (v_empty_BNC.float() - v_teacher_BNC.float())
        norm_B = (x0 - teacher - ca).abs().flatten(1).mean(1).clamp_min(config.norm_floor)
        target = x0 + dm + ca
    error = x0 - target
    if config.loss == "huber":
        cost = (error.square() + config.huber_c**2).sqrt() - config.huber_c
    else:
        cost = error.square()
    loss_B = cost.flatten(1).mean(1) / norm_B
    return loss_B, {"loss": loss_B.detach(), "dm": _rms(dm), "guidance": _rms(ca), "norm": norm_B}


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images of one prompt length, at every level of the student's way from noise to image."""

    places_B: list[int]
    """Where these images are among all of the iteration."""
    text_BLD: Tensor
    states_SBNC: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What an iteration sampled with the student."""

    batches: list[Batch]
    levels_S: Tensor
    grid: tuple[int, int]
    empty_LD: Tensor
    """Text of the empty prompt, for guidance."""
    total: int
    """Images of the iteration, of which other processes may have drawn some."""

    @property
    def count(self) -> int:
        return sum(len(batch.text_BLD) for batch in self.batches)


@torch.no_grad()
def rollout(
    model: Model, student: Policy, conditioner: Conditioner, prompts: Sequence[str], config: TDMConfig, seed: int,
    places: Sequence[int] | None = None,
) -> Rollout:  # fmt: skip
    """The student's way from noise, as it will be sampled. The same arguments and weights give the same bits.

    `places`: sample only these of the prompts, with the noise that they have among all of them.
    """
    places = range(len(prompts)) if places is None else places
    levels = student_grid(model, config.num_steps)
    grid = model.grid(model.default_size, model.default_size)
    texts = [text for text in conditioner.encode([prompts[i] for i in places]) for _ in range(config.images)]
    images = [place * config.images + i for place in places for i in range(config.images)]
    noise_BNC = initial_noise(model, [seed + i for i in images], model.default_size, model.default_size)
    batches = []
    with student.acting() as transformer:
        for rows, text_BLD in in_batches(transformer, texts, config.batch_size, config.images):
            states = [noise_BNC[rows]]
            for sigma, s, s_next in zip(levels, levels.tolist(), levels.tolist()[1:], strict=False):
                v = velocity(transformer, states[-1], sigma, text_BLD, grid)
                states.append(euler_step(states[-1], v, s, s_next))
            where = [images[row] for row in rows]
            batches.append(Batch(places_B=where, text_BLD=text_BLD, states_SBNC=torch.stack(states)))
    (empty_LD,) = conditioner.encode([""])
    total = len(prompts) * config.images
    return Rollout(batches=batches, levels_S=levels, grid=grid, empty_LD=empty_LD, total=total)


def _chances(
    sampled: Rollout, margin: float, generator: torch.Generator
) -> Iterator[tuple[Batch, Stages, Float[Tensor, "B N C"]]]:
    """Each batch with stages and noise, which an image has whatever shares its batch or process."""
    stages = draw_stages(sampled.levels_S, sampled.total, margin, generator)
    shape = (sampled.total, *sampled.batches[0].states_SBNC.shape[2:])
    noise = torch.randn(shape, generator=generator)
    for batch in sampled.batches:
        rows = batch.places_B
        own = Stages(
            index_B=stages.index_B[rows], start_B=stages.start_B[rows], end_B=stages.end_B[rows],
            tau_B=stages.tau_B[rows],
        )  # fmt: skip
        yield batch, own, noise[rows].to(batch.states_SBNC.device)


def train_critic(
    critic: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, config: TDMConfig, generator: torch.Generator,
    average_gradients: AverageGradients = alone,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step of the critic on stages of the rollout, which is already all that the student says of them.

    Returns `critic/loss` and `critic/grad_norm`. Raises FloatingPointError before a step that is not finite.
    """
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for batch, stages, noise in _chances(sampled, config.margin, generator):
        rows = torch.arange(len(batch.text_BLD))
        x, x_next = batch.states_SBNC[stages.index_B, rows], batch.states_SBNC[stages.index_B + 1, rows]
        taken = (x_next - x) / wide(stages.end_B - stages.start_B, x)
        noised = CRITIC_TARGETS[config.critic_target](land(x, taken, stages), stages, noise)
        with critic.acting() as transformer:
            v = velocity(transformer, noised.x_BNC, stages.tau_B, batch.text_BLD, sampled.grid)
            loss = critic_loss(v, noised).sum() / sampled.count
            loss.backward()
        total += float(loss.detach())
    average_gradients(list(critic.parameters.values()))
    norm = _step(critic, optimizer, config.max_grad_norm)
    return {"critic/loss": total, "critic/grad_norm": norm}


def teach_guidance(
    student: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, config: TDMConfig, generator: torch.Generator,
    average_gradients: AverageGradients = alone,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step of the student towards the guided teacher's way through one stage of each image, from the
    student's own state at its start.

    Returns `loss`, `grad_norm` and `guidance`, the root mean square of what guidance changes of the predicted image.
    Raises FloatingPointError before a step that is not finite.
    """

    def loss(batch: Batch, stages: Stages, noise: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        target, ca, there = torch.zeros_like(v), torch.zeros_like(v), x
        for step in range(config.warmup_substeps):
            level_B = torch.lerp(stages.start_B, stages.end_B, step / config.warmup_substeps)
            v_teacher, v_empty = _taught(student, there, level_B, batch, sampled, config)
            pull = config.guidance * (v_teacher - v_empty)
            there = there + wide((stages.end_B - stages.start_B) / config.warmup_substeps, x) * (v_teacher + pull)
            target = target + (v_teacher + pull) / config.warmup_substeps
            ca = ca + pull / config.warmup_substeps
        loss_B = (v - target).square().flatten(1).mean(1)
        return loss_B, {"loss": loss_B.detach(), "guidance": _rms(wide(stages.start_B, x) * ca)}

    return _update(student, optimizer, sampled, config, generator, loss, average_gradients)


def train_student(
    student: Policy, critic: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, config: TDMConfig,
    generator: torch.Generator, average_gradients: AverageGradients = alone,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step of the student; of each image one stage is evaluated again, with gradients.

    Returns `loss`, `grad_norm` and the root mean squares `dm` and `guidance` of the two terms, with `norm`.
    Raises FloatingPointError before a step that is not finite.
    """

    def loss(batch: Batch, stages: Stages, noise: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        landing = land(x, v, stages)
        detached = Landing(x_BNC=landing.x_BNC.detach(), x0_BNC=landing.x0_BNC.detach())
        seen = CRITIC_TARGETS[config.critic_target](detached, stages, noise).x_BNC
        v_teacher, v_empty = _taught(student, seen, stages.tau_B, batch, sampled, config)
        with torch.no_grad(), critic.acting() as transformer:
            v_critic = velocity(transformer, seen, stages.tau_B, batch.text_BLD, sampled.grid)
        return student_loss(landing.x0_BNC, seen, stages.tau_B, v_teacher, v_empty, v_critic, config)

    return _update(student, optimizer, sampled, config, generator, loss, average_gradients)


StageLoss = Callable[[Batch, Stages, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Of a batch, its stages, noise, x at their start and the student's velocity there: losses and metrics, each [B]."""


def _update(
    student: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, config: TDMConfig, generator: torch.Generator,
    loss: StageLoss, average_gradients: AverageGradients,
) -> dict[str, float]:  # fmt: skip
    totals: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for batch, stages, noise in _chances(sampled, config.margin, generator):
        x = batch.states_SBNC[stages.index_B, torch.arange(len(batch.text_BLD))]
        with student.acting() as transformer:
            v = velocity(transformer, x, stages.start_B, batch.text_BLD, sampled.grid)
            loss_B, metrics = loss(batch, stages, noise, x, v)
            (loss_B.sum() / sampled.count).backward()  # within the role: checkpointing repeats the forward
        for name, value_B in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value_B.sum()) / sampled.count
    average_gradients(list(student.parameters.values()))
    totals["grad_norm"] = _step(student, optimizer, config.max_grad_norm)
    student.update_average(config.ema)
    return totals


@torch.no_grad()
def _taught(
    student: Policy, x: Tensor, level_B: Tensor, batch: Batch, sampled: Rollout, config: TDMConfig
) -> tuple[Tensor, Tensor]:
    """Velocities of the teacher with the prompt and, if there is guidance, with the empty one."""
    with student.reference() as teacher:
        v_teacher = v_empty = velocity(teacher, x, level_B, batch.text_BLD, sampled.grid)
        if config.guidance > 0:
            empty_BLD = sampled.empty_LD.expand(len(x), -1, -1)
            v_empty = velocity(teacher, x, level_B, empty_BLD, sampled.grid)
    return v_teacher, v_empty


def _step(policy: Policy, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    norm = policy.clip_gradients(max_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the {policy.name}'s gradient is not finite: no step was taken")
    optimizer.step()
    return float(norm)


def _rms(x_BNC: Tensor) -> Tensor:
    return x_BNC.square().flatten(1).mean(1).sqrt()
