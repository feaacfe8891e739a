"""Flow-GRPO: policy gradients on the stochastic steps of a flow model's sampler.

Papers: Flow-GRPO (arXiv 2505.05470), MixGRPO (2507.21802: noise and loss on a window of steps only), Flow-CPS
(2509.05952: the default step), GRPO-Guard (2510.22319: `guard`), GDPO for several rewards (rewards/combining).

For each prompt a group of G images is drawn. Inside a window of steps, shared by all groups of the iteration, a step
is Gaussian, x' ~ N(mu_theta(x), std^2); outside it is Euler. With an image's advantage A and r = p_theta / p_old of
the step it took,

    loss = mean over images and window of
           max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl |mu_theta - mu_ref|^2 / (2 std^2)

Left out: guidance in rollouts and training (it is distilled in otherwise; it can be added when sampling), and the
recomputation of log p_old (the rollout's own is exact, which the pre-flight check proves).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import STEPS, euler_step, sigmas
from rlhf_img.model.forward import by_length, velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.sampling import initial_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig:
    """Settings of GRPO; the defaults are those that the embedded model's results were made with."""

    prompts: int = 8
    """P, prompts an iteration."""
    group: int = 12
    """G, images a prompt."""
    num_steps: int = 10
    """S, denoising steps in a rollout."""
    window: int = 2
    """Stochastic steps in a row; only they are trained."""
    window_span: float = 0.5
    """The window starts, uniformly, in this first share of the steps."""
    step: Literal["cps", "flow_sde", "dance"] = "cps"
    """The stochastic step."""
    eta: float = 0.8
    """Its strength."""
    shared_noise: bool = True
    """Whether the images of a group start from the same noise, so that they differ by the window alone."""
    updates: int = 1
    """Optimiser steps an iteration, each on its share of the prompts."""
    lr: float = 4e-4
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    clip: float = 1e-3
    """Clip range of the ratio, on the scale of log-probabilities averaged over dimensions."""
    advantage_clip: float = 5.0
    """Advantages are clipped to plus or minus this."""
    kl: float = 0.0
    """Weight of the divergence from the reference; 0 skips the reference's forward."""
    guard: bool = False
    """GRPO-Guard: ratios without their bias, comparable between steps of different noise."""
    ema: float = 0.9
    """Decay, an optimiser step, of the averaged weights."""
    batch_size: int = 128
    """Images a forward, at most."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        rules = {
            "grpo.prompts must be 1 or more": self.prompts >= 1,
            "grpo.group must be 2 or more: a group of one has no spread": self.group >= 2,
            "grpo.window must lie between 1 and grpo.num_steps - 1: the last step is deterministic":
                1 <= self.window < self.num_steps,
            "grpo.window_span must lie between 0 and 1": 0 <= self.window_span <= 1,
            "grpo.updates must lie between 1 and grpo.prompts": 1 <= self.updates <= self.prompts,
            "grpo.clip, grpo.lr, grpo.eta and grpo.advantage_clip must be above 0":
                min(self.clip, self.lr, self.eta, self.advantage_clip) > 0,
            "grpo.ema must lie between 0 and 1, 1 excluded": 0 <= self.ema < 1,
            "grpo.kl must be 0 or more": self.kl >= 0,
        }  # fmt: skip
        for rule, met in rules.items():
            if not met:
                raise RlhfImgError(f"{rule}; got {self}")


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
class Batch:
    """Images of one prompt length that went through the sampler together, and will again in training."""

    rows_B: list[int]
    """Where these images are in the iteration's prompt-major list of P x G."""
    text_BLD: Tensor
    visited_WBNC: Tensor
    """Latents before each step of the window, and after its last one: W + 1."""
    mean_WBNC: Tensor
    """Mean of each step under the old policy."""
    logp_WB: Tensor
    """Log-probability of each step under the old policy."""
    final_BNC: Tensor
    """Latents at sigma 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What an iteration sampled."""

    levels: list[float]
    """The S + 1 noise levels."""
    window: range
    """Steps that were stochastic."""
    batches: list[Batch]
    grid: tuple[int, int]

    def latents(self) -> Float[Tensor, "B N C"]:
        """Final latents in prompt-major order."""
        rows = torch.tensor([i for batch in self.batches for i in batch.rows_B])
        return torch.cat([batch.final_BNC for batch in self.batches])[rows.argsort()]


@torch.no_grad()
def rollout(
    model: Model, policy: Policy, conditioner: Conditioner, prompts: Sequence[str], config: GRPOConfig, seed: int
) -> Rollout:
    """Samples G images for each prompt. The same arguments and weights give the same rollout, to the bit."""
    grid = model.grid(model.default_size, model.default_size)
    levels = sigmas(config.num_steps, grid[0] * grid[1], model.scheduler.config, model.is_distilled)
    generator = torch.Generator().manual_seed(seed)
    starts = max(1, min(round(config.num_steps * config.window_span), config.num_steps - config.window))
    start = int(torch.randint(starts, (), generator=generator))
    window = range(start, start + config.window)
    images = range(len(prompts) * config.group)
    repeat = [i // config.group * config.group if config.shared_noise else i for i in images]
    noise_BNC = initial_noise(model, [seed + i for i in repeat], model.default_size, model.default_size)
    texts = [text for text in conditioner.encode(prompts) for _ in range(config.group)]
    per_batch = max(1, config.batch_size // config.group) * config.group
    batches = []
    with policy.acting() as transformer:
        for rows, text_BLD in by_length(texts):
            for first in range(0, len(rows), per_batch):
                some = rows[first : first + per_batch]
                batch = _sample_batch(
                    transformer, noise_BNC[some], text_BLD[first : first + per_batch], levels, window, grid, config,
                    generator, some,
                )  # fmt: skip
                batches.append(batch)
    return Rollout(levels=levels.tolist(), window=window, batches=batches, grid=grid)


def _sample_batch(
    transformer: torch.nn.Module, x: Tensor, text_BLD: Tensor, levels: Tensor, window: range, grid: tuple[int, int],
    config: GRPOConfig, generator: torch.Generator, rows: list[int],
) -> Batch:  # fmt: skip
    visited, means, logps = [], [], []
    for i, (s, s_next) in enumerate(zip(levels.tolist(), levels.tolist()[1:], strict=False)):
        v = velocity(transformer, x, levels[i], text_BLD, grid)
        if i in window:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            step = STEPS[config.step](x, v, s, s_next, config.eta, noise=noise, sigma_max=float(levels[1]))
            visited.append(x)
            means.append(step.mean)
            logps.append(step.logp_B)
            x = step.x_next
            if i == window[-1]:
                visited.append(x)
        else:
            x = euler_step(x, v, s, s_next)
    return Batch(
        rows_B=rows, text_BLD=text_BLD, visited_WBNC=torch.stack(visited), mean_WBNC=torch.stack(means),
        logp_WB=torch.stack(logps), final_BNC=x,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """One step of the window under the policy as it is now, with gradients."""

    rows_B: list[int]
    log_ratio_B: Tensor
    mean_BNC: Tensor
    mean_old_BNC: Tensor
    mean_ref_BNC: Tensor | None
    std: float


def replay(policy: Policy, sampled: Rollout, config: GRPOConfig) -> Iterator[Replay]:
    """Every batch and step of the window again, in the shapes of the rollout so that rounding is the same."""
    for batch in sampled.batches:
        for k, i in enumerate(sampled.window):
            s, s_next = sampled.levels[i], sampled.levels[i + 1]
            x, x_next = batch.visited_WBNC[k], batch.visited_WBNC[k + 1]
            sigma = torch.tensor(s, device=x.device)
            with policy.acting() as transformer:
                v = velocity(transformer, x, sigma, batch.text_BLD, sampled.grid)
            take = STEPS[config.step]
            step = take(x, v, s, s_next, config.eta, x_next=x_next, sigma_max=sampled.levels[1])
            mean_ref = None
            if config.kl > 0:
                with policy.reference() as reference:
                    v_ref = velocity(reference, x, sigma, batch.text_BLD, sampled.grid)
                mean_ref = take(x, v_ref, s, s_next, config.eta, x_next=x_next, sigma_max=sampled.levels[1]).mean
            yield Replay(
                rows_B=batch.rows_B, log_ratio_B=step.logp_B - batch.logp_WB[k], mean_BNC=step.mean,
                mean_old_BNC=batch.mean_WBNC[k], mean_ref_BNC=mean_ref, std=step.std,
            )  # fmt: skip


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, advantages_B: Float[Tensor, " B"],
    config: GRPOConfig,
) -> dict[str, float]:  # fmt: skip
    """The optimiser steps of one iteration.

    Returns means over images and window of loss, kl and ratio statistics, and the gradient norm.
    Raises FloatingPointError before an optimiser step whose loss or gradient is not finite.
    """
    advantages_B = advantages_B.clamp(-config.advantage_clip, config.advantage_clip)
    totals: dict[str, float] = {}
    parts = _split(sampled, config)
    for part in parts:
        count = sum(len(batch.rows_B) for batch in part.batches) * len(part.window)
        optimizer.zero_grad(set_to_none=True)
        for item in replay(policy, part, config):
            loss_B, metrics = step_loss(item, advantages_B[item.rows_B], config)
            (loss_B.sum() / count).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.sum()) / count / len(parts)
            deviation = float((item.log_ratio_B.detach().exp() - 1).abs().max())
            totals["ratio/max_dev"] = max(totals.get("ratio/max_dev", 0.0), deviation)
        norm = torch.nn.utils.clip_grad_norm_(list(policy.parameters.values()), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite (loss {totals['loss']:.4g}): no step was taken")
        optimizer.step()
        policy.update_average(config.ema)
        totals["grad_norm"] = totals.get("grad_norm", 0.0) + float(norm) / len(parts)
    return totals


def step_loss(item: Replay, advantage_B: Tensor, config: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each image at one step of the window, and per-image metrics without gradients."""
    ratio_B = item.log_ratio_B.exp()
    if config.guard:
        ratio_B = guarded_ratio(item.log_ratio_B, item.mean_BNC, item.mean_old_BNC, item.std)
    loss_B = clipped_loss(ratio_B, advantage_B, config.clip)
    kl_B = torch.zeros_like(loss_B)
    if item.mean_ref_BNC is not None:
        kl_B = kl_divergence(item.mean_BNC, item.mean_ref_BNC, item.std)
        loss_B = loss_B + config.kl * kl_B
    outside = ((ratio_B - 1).abs() > config.clip).float()
    return loss_B, {"loss": loss_B.detach(), "kl": kl_B.detach(), "clip_fraction": outside.detach()}


def _split(sampled: Rollout, config: GRPOConfig) -> list[Rollout]:
    """The rollout in `config.updates` parts of whole batches, as even as its batches allow."""
    if config.updates == 1:
        return [sampled]
    parts: list[list[Batch]] = [[] for _ in range(config.updates)]
    for batch in sorted(sampled.batches, key=lambda b: -len(b.rows_B)):
        min(parts, key=lambda part: sum(len(b.rows_B) for b in part)).append(batch)
    return [
        Rollout(levels=sampled.levels, window=sampled.window, batches=part, grid=sampled.grid)
        for part in parts
        if part
    ]
