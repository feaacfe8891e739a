"""GRPO on a flow model: policy gradients with group-relative advantages.

For each prompt a group of G images is drawn and scored. With an image's advantage A and the likelihood ratio
r = p_theta / p_old of what was drawn,

    loss = mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl D(theta, reference)

A flow model gives no likelihood, so one of two stands in for it (`likelihood`):

"forward" (AWM, arXiv 2509.25050; the same ratio as FPO, 2507.21053): the image's under the forward process. The image
x0 is noised to x = (1 - s) x0 + s eps at `draws` levels s, log p = -mean |v_theta(x, s) - u|^2 with u = eps - x0, and D
is mean |v_theta - v_ref|^2. Rollouts are plain Euler from noise of their own. s and eps are shared by a group, whose
advantages add up to 0, so that what they have in common cancels out of the gradient. Where D has a weight, log p is
taken to first order about v_ref: its square pays for moving ever further from a bad image, and broke long runs.
The loss is then convex in v_theta, and for one batch least at v_ref + E[A (u - v_ref) | x] / kl, which is where
DiffusionNFT (2509.16117) ends too.

"steps" (Flow-GRPO, 2505.05470; MixGRPO, 2507.21802): that of the sampler's own steps. Inside a window of steps, shared
by all groups of the iteration, a step is Gaussian, x' ~ N(mu_theta(x), std^2) (Flow-CPS, 2509.05952, by default);
outside it is Euler. D is |mu - mu_ref|^2 / (2 std^2). GRPO-Guard (2510.22319) is `guard`.

Why "forward" is the default: the noise of a step has as many dimensions as the image, and only chance correlations with
the reward; images differ from each other in far fewer. benchmarks/gradients.py measures both.

Left out: guidance in rollouts and training (it is distilled in otherwise; it can be added when sampling), and the
recomputation of log p_old (a rollout's own is exact, which the pre-flight check proves). Several rewards become one
advantage in rewards/combining.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_img.algorithms.rollout import Batch, Draw, Rollout, RolloutConfig, Step, forward_logp, require
from rlhf_img.model.flow import STEPS, SdeStep
from rlhf_img.model.forward import velocity
from rlhf_img.model.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig(RolloutConfig):
    """Settings of GRPO, with those of its rollouts."""

    lr: float = 2e-3
    """Learning rate of AdamW at the start; it falls linearly to 0 over the run."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    clip: float = 1e-3
    """Clip range of the ratio, on the scale of log-probabilities averaged over dimensions."""
    advantage_clip: float = 5.0
    """Advantages are clipped to plus or minus this."""
    kl: float = 0.05
    """Weight of the divergence from the reference; 0 skips the reference's forwards. With "steps", whose divergence is
    larger, 0.04 is usual."""
    reference_guidance: float = 0.0
    """Krea's g of the reference. Above 0 the policy, which samples without guidance, is held to the guided base: to its
    prompt following and to its glitches."""
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
    """Divergence from the reference, if that has a weight."""


def replay(policy: Policy, sampled: Rollout, config: GRPOConfig) -> Iterator[Replay]:
    """Every batch and term again: steps in the shapes of the rollout, so that rounding is the same, draws together."""
    for batch in sampled.batches:
        draws = [term for term in batch.terms if isinstance(term, Draw)]
        steps = [term for term in batch.terms if isinstance(term, Step)]
        at_once = max(1, config.batch_size // len(batch.rows_B))
        for first in range(0, len(draws), at_once):
            some = draws[first : first + at_once]
            x = torch.cat([draw.x_BNC for draw in some])
            sigma = torch.tensor([draw.sigma for draw in some for _ in batch.rows_B], device=x.device)
            text = batch.text_BLD.repeat(len(some), 1, 1)
            yield _replay_draws(some, *_velocities(policy, sampled, x, sigma, text, config), batch.rows_B)
        for step in steps:
            sigma = torch.tensor(step.sigma, device=step.x_BNC.device)
            v, v_ref = _velocities(policy, sampled, step.x_BNC, sigma, batch.text_BLD, config)
            yield _replay_step(step, v, v_ref, batch.rows_B, config, sampled.sigma_max)


def _velocities(
    policy: Policy, sampled: Rollout, x: Tensor, sigma: Tensor, text_BLD: Tensor, config: GRPOConfig
) -> tuple[Tensor, Tensor | None]:
    """That of the policy, and that of the guided reference if it has a weight."""
    with policy.acting() as transformer:
        v = velocity(transformer, x, sigma, text_BLD, sampled.grid)
    if config.kl == 0:
        return v, None
    with policy.reference() as reference:
        v_ref = velocity(reference, x, sigma, text_BLD, sampled.grid)
        if config.reference_guidance > 0:
            empty_BLD = sampled.empty_LD.expand(len(x), -1, -1)
            v_ref += config.reference_guidance * (v_ref - velocity(reference, x, sigma, empty_BLD, sampled.grid))
    return v, v_ref


def _replay_draws(draws: Sequence[Draw], v: Tensor, v_ref: Tensor | None, rows_B: list[int]) -> Replay:
    target = torch.cat([draw.target_BNC for draw in draws])
    old = [draw.old_BNC for draw in draws if draw.old_BNC is not None]
    v_old = torch.cat(old) if old else v.detach()
    log_ratio_B = forward_logp(v, target, v_ref) - forward_logp(v_old, target, v_ref)
    kl_B = None if v_ref is None else -forward_logp(v, v_ref)
    return Replay(rows_B=rows_B * len(draws), log_ratio_B=log_ratio_B, ratio_B=log_ratio_B.exp(), kl_B=kl_B)


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
    return Replay(rows_B=rows_B, log_ratio_B=log_ratio_B, ratio_B=ratio_B, kl_B=kl_B)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, advantages_B: Float[Tensor, " B"],
    config: GRPOConfig, average_gradients: Callable[[list[nn.Parameter]], None] = lambda parameters: None,
) -> dict[str, float]:  # fmt: skip
    """The optimiser steps of one iteration. `average_gradients` is called before each, for runs of several processes.

    Returns means over images and terms of loss, kl and ratio statistics, and the gradient norm.
    Raises FloatingPointError before an optimiser step whose loss or gradient is not finite.
    """
    advantages_B = advantages_B.clamp(-config.advantage_clip, config.advantage_clip)
    totals: dict[str, float] = {}
    parts = _split(sampled, config)
    parameters = list(policy.parameters.values())
    for part in parts:
        count = sum(len(batch.rows_B) * len(batch.terms) for batch in part.batches)
        optimizer.zero_grad(set_to_none=True)
        for item in replay(policy, part, config):
            loss_B, metrics = term_loss(item, advantages_B[item.rows_B], config)
            with policy.acting():  # checkpointing repeats the forward
                (loss_B.sum() / count).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.sum()) / count / len(parts)
            deviation = float((item.log_ratio_B.detach().exp() - 1).abs().max())
            totals["ratio/max_dev"] = max(totals.get("ratio/max_dev", 0.0), deviation)
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite (loss {totals['loss']:.4g}): no step was taken")
        optimizer.step()
        policy.update_average(config.ema)
        totals["grad_norm"] = totals.get("grad_norm", 0.0) + float(norm) / len(parts)
    return totals


def term_loss(item: Replay, advantage_B: Tensor, config: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each image at one term of its likelihood, and per-image metrics without gradients."""
    loss_B = clipped_loss(item.ratio_B, advantage_B, config.clip)
    kl_B = torch.zeros_like(loss_B)
    if item.kl_B is not None:
        kl_B = item.kl_B
        loss_B = loss_B + config.kl * kl_B
    outside = ((item.ratio_B - 1).abs() > config.clip).float()
    return loss_B, {"loss": loss_B.detach(), "kl": kl_B.detach(), "clip_fraction": outside.detach()}


def _split(sampled: Rollout, config: GRPOConfig) -> list[Rollout]:
    """The rollout in `config.updates` parts of whole batches, as even as its batches allow."""
    if config.updates == 1:
        return [sampled]
    parts: list[list[Batch]] = [[] for _ in range(config.updates)]
    for batch in sorted(sampled.batches, key=lambda b: -len(b.rows_B)):
        min(parts, key=lambda part: sum(len(b.rows_B) for b in part)).append(batch)
    return [replace(sampled, batches=part) for part in parts if part]
