"""GRPO on a flow model: policy gradients with group-relative advantages.

For each prompt a group of G images is drawn and scored. With an image's advantage A and the likelihood ratio
r = p_theta / p_old of what was drawn,

    loss = mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl D(theta, reference)

A flow model gives no likelihood, so one of two stands in for it (`likelihood`):

"forward": the image's, under the forward process, in draws at several noise levels: algorithms/awm.py.

"steps" (Flow-GRPO, 2505.05470; MixGRPO, 2507.21802): that of the sampler's own steps. Inside a window of steps, shared
by all groups of the iteration, a step is Gaussian, x' ~ N(mu_theta(x), std^2) (Flow-CPS, 2509.05952, by default);
outside it is Euler. D is |mu - mu_ref|^2 / (2 std^2). GRPO-Guard (2510.22319) is `guard`.

Why "forward" is the default: the noise of a step has as many dimensions as the image, and only chance correlations with
the reward; images differ from each other in far fewer. benchmarks/gradients.py measures both.

Left out: guidance in rollouts and training (it is distilled in otherwise; it can be added when sampling), and the
recomputation of log p_old (a rollout's own is exact, which the pre-flight check proves). Several rewards become one
advantage in rewards/combining.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.algorithms import awm
from rlhf_img.algorithms.rollout import AverageGradients, Rollout, Step, StepsConfig, alone, require
from rlhf_img.algorithms.updating import Draws, optimise, split, together, velocities
from rlhf_img.model.flow import STEPS, SdeStep
from rlhf_img.model.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig(StepsConfig):
    """Settings of GRPO, with those of its rollouts."""

    section: ClassVar[str] = "grpo"

    lr: float = 2e-3
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    clip: float = 1e-3
    """Clip range of the ratio, on the scale of log-probabilities averaged over dimensions."""
    advantage_clip: float = 5.0
    """Advantages are clipped to plus or minus this."""
    kl: float = 0.05
    """Weight of the divergence from the reference; 0, without `hold`, skips its forwards. With "steps", whose
    divergence is larger, 0.04 is usual."""
    reference_guidance: float = 0.0
    """Krea's g of the reference at the noise levels that are trained; what is below them is held to the unguided base.
    Above 0 the policy, which samples without guidance, is pulled to the guided base's prompt following."""
    guard: bool = False
    """steps: GRPO-Guard: ratios without their bias, comparable between steps of different noise."""
    ema: float = 0.9
    """Decay, an optimiser step, of the averaged weights."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        super(GRPOConfig, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        require(
            {
                "grpo.clip, grpo.lr and grpo.advantage_clip must be above 0":
                    min(self.clip, self.lr, self.advantage_clip) > 0,
                "grpo.ema must lie between 0 and 1, 1 excluded": 0 <= self.ema < 1,
                "grpo.kl and grpo.reference_guidance must be 0 or more": min(self.kl, self.reference_guidance) >= 0,
            },
            self,
        )  # fmt: skip


def clipped_loss(
    ratio_B: Float[Tensor, " B"], advantage_B: Float[Tensor, " B"], clip: float
) -> Float[Tensor, " B"]:
    """PPO's pessimistic surrogate, per sample: max(-A r, -A clip(r, 1 - clip, 1 + clip))."""
    return torch.maximum(-advantage_B * ratio_B, -advantage_B * ratio_B.clamp(1 - clip, 1 + clip))


def kl_divergence(
    mean_BNC: Float[Tensor, "B N C"], mean_ref_BNC: Float[Tensor, "B N C"], std: float
) -> Float[Tensor, " B"]:
    """KL between two Gaussian steps of one `std`, per sample, averaged over dimensions: (mu - mu_ref)^2 / (2 std^2)."""
    return (mean_BNC - mean_ref_BNC).square().flatten(1).mean(1) / (2 * std**2)


def guarded_ratio(
    log_ratio_B: Float[Tensor, " B"], mean_BNC: Float[Tensor, "B N C"], mean_old_BNC: Float[Tensor, "B N C"], std: float
) -> Float[Tensor, " B"]:
    """GRPO-Guard's normalised ratio exp((log r + mean (mu - mu_old)^2 / (2 std^2)) std).

    The expected log-ratio of two Gaussians is the negative of the added term, so that the result is centred on 1, and
    the factor `std` gives steps of different noise the same spread.
    """
    return torch.exp((log_ratio_B + kl_divergence(mean_BNC, mean_old_BNC, std)) * std)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """One step, or draws, of images under the policy as it is now, with gradients."""

    rows_B: list[int]
    """Where these images are in the iteration; an image is there once for each of its draws."""
    log_ratio_B: Tensor
    ratio_B: Tensor
    """exp of it, but with GRPO-Guard normalised."""
    kl_B: Tensor | None
    """Divergence from the reference, if that has a weight here or where the policy is held."""
    held_B: Tensor
    """Whether it is below the levels that are trained, and only held to the reference."""
    weight_B: Tensor
    """How many images each stands for."""


def replay(policy: Policy, sampled: Rollout, config: GRPOConfig) -> Iterator[Replay]:
    """Every batch and term again: steps in the shapes of the rollout, so that rounding is the same, draws together."""
    guidance = config.reference_guidance if config.kl else None
    of_draws = config.reference_guidance if config.kl or config.holds else None
    for batch in sampled.batches:
        for draws in together(batch, config.batch_size):
            v, v_ref = velocities(
                policy, sampled, draws.x_BNC, draws.sigma_B, draws.text_BLD, of_draws, guided_from=config.min_sigma
            )
            yield _replay_draws(draws, v, v_ref, config)
        for step in [term for term in batch.terms if isinstance(term, Step)]:
            sigma = torch.tensor(step.sigma, device=step.x_BNC.device)
            v, v_ref = velocities(policy, sampled, step.x_BNC, sigma, batch.text_BLD, guidance)
            yield _replay_step(step, v, v_ref, batch.rows_B, config, sampled.sigma_max)


def _replay_draws(draws: Draws, v: Tensor, v_ref: Tensor | None, config: GRPOConfig) -> Replay:
    v_old = v.detach() if draws.old_BNC is None else draws.old_BNC
    log_ratio_B = awm.log_ratio(v, v_old, draws.target_BNC, v_ref if config.kl else None)
    kl_B = None if v_ref is None else awm.divergence(v, v_ref)
    return Replay(rows_B=draws.rows_B, log_ratio_B=log_ratio_B, ratio_B=log_ratio_B.exp(), kl_B=kl_B,
                  held_B=draws.sigma_B < config.min_sigma, weight_B=draws.weight_B)


def _replay_step(
    term: Step, v: Tensor, v_ref: Tensor | None, rows_B: list[int], config: GRPOConfig, sigma_max: float
) -> Replay:
    def take(v: Tensor) -> SdeStep:
        s, s_next, x_next = term.sigma, term.sigma_next, term.x_next_BNC
        return STEPS[config.step](term.x_BNC, v, s, s_next, config.eta, x_next=x_next, sigma_max=sigma_max)

    step = take(v)
    log_ratio_B = step.logp_B - term.logp_B
    ratio_B = guarded_ratio(log_ratio_B, step.mean, term.mean_BNC, step.std) if config.guard else log_ratio_B.exp()
    kl_B = None if v_ref is None else kl_divergence(step.mean, take(v_ref).mean, step.std)
    return Replay(rows_B=rows_B, log_ratio_B=log_ratio_B, ratio_B=ratio_B, kl_B=kl_B,
                  held_B=torch.zeros_like(ratio_B, dtype=torch.bool), weight_B=torch.ones_like(ratio_B))


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, advantages_B: Float[Tensor, " B"],
    config: GRPOConfig, average_gradients: AverageGradients = alone,
) -> dict[str, float]:  # fmt: skip
    """The optimiser steps of one iteration. `average_gradients` is called before each, for runs of several processes.

    Returns means over images and terms of loss, kl and ratio statistics, and the gradient norm.
    Raises FloatingPointError before an optimiser step whose loss or gradient is not finite.
    """
    advantages_B = advantages_B.clamp(-config.advantage_clip, config.advantage_clip)
    deviations = [0.0]

    def losses(part: Rollout) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
        for item in replay(policy, part, config):
            deviations.append(float((item.log_ratio_B.detach().exp() - 1).abs().max()))
            yield *term_loss(item, advantages_B[item.rows_B], config), item.weight_B

    totals: dict[str, float] = {}
    for part in (parts := split(sampled, config.updates)):
        means = optimise(policy, optimizer, part, losses, config.max_grad_norm, average_gradients)
        policy.update_average(config.ema)
        totals = {name: totals.get(name, 0.0) + value / len(parts) for name, value in means.items()}
    return {**totals, "ratio/max_dev": max(deviations)}


def term_loss(item: Replay, advantage_B: Tensor, config: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each image at one term of its likelihood, and per-image metrics without gradients."""
    loss_B = clipped_loss(item.ratio_B, advantage_B, config.clip)
    kl_B = torch.zeros_like(loss_B)
    if item.kl_B is not None:
        kl_B = item.kl_B
        loss_B = torch.where(item.held_B, config.hold * kl_B, loss_B + config.kl * kl_B)
    outside = ((item.ratio_B - 1).abs() > config.clip).float()
    return loss_B, {"loss": loss_B.detach(), "kl": kl_B.detach(), "clip_fraction": outside.detach()}
