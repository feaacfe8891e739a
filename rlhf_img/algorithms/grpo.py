"""GRPO on a flow model: policy gradients with group-relative advantages.

For each prompt a group of G images is drawn and scored. With an image's advantage A and the likelihood ratio
r = p_theta / p_old of what was drawn,

    loss = mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) + kl D(theta, reference)

A flow model gives no likelihood, so one of two stands in for it (`likelihood`):

"forward" (AWM, arXiv 2509.25050; the same ratio as FPO, 2507.21053): the image's under the forward process. The image
x0 is noised to x = (1 - s) x0 + s eps at `draws` levels s, log p = -mean |v_theta(x, s) - (eps - x0)|^2, and D is
mean |v - v_ref|^2. Rollouts are plain Euler from noise of their own. s and eps are shared by a group, whose advantages
add up to 0, so that what they have in common cancels out of the gradient.

"steps" (Flow-GRPO, 2505.05470; MixGRPO, 2507.21802): that of the sampler's own steps. Inside a window of steps, shared
by all groups of the iteration, a step is Gaussian, x' ~ N(mu_theta(x), std^2) (Flow-CPS, 2509.05952, by default);
outside it is Euler. D is |mu - mu_ref|^2 / (2 std^2). GRPO-Guard (2510.22319) is `guard`.

Why "forward" is the default: the noise of a step has as many dimensions as the image, and only chance correlations with
the reward; images differ from each other in far fewer. benchmarks/gradients.py measures both.

Left out: guidance in rollouts and training (it is distilled in otherwise; it can be added when sampling), and the
recomputation of log p_old (a rollout's own is exact, which the pre-flight check proves). Several rewards become one
advantage in rewards/combining.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import STEPS, SdeStep, euler_step, sigmas
from rlhf_img.model.forward import by_length, velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.sampling import in_parts, initial_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig:
    """Settings of GRPO; the defaults are those that the embedded model's results were made with."""

    prompts: int = 8
    """P, prompts an iteration."""
    group: int = 12
    """G, images a prompt."""
    num_steps: int = 8
    """S, denoising steps in a rollout."""
    likelihood: Literal["forward", "steps"] = "forward"
    """Of the image under the forward process, or of the stochastic steps that made it."""
    draws: int = 4
    """forward: noise levels at which an image is trained, one in each of so many equal parts of the range."""
    min_sigma: float = 0.4
    """forward: the lowest noise level of a draw."""
    max_sigma: float = 0.9
    """forward: the highest."""
    window: int = 2
    """steps: stochastic steps in a row; only they are trained."""
    window_span: float = 0.5
    """steps: the window starts, uniformly, in this first share of the steps."""
    step: Literal["cps", "flow_sde", "dance"] = "cps"
    """steps: the stochastic step."""
    eta: float = 0.8
    """steps: its strength."""
    shared_noise: bool = True
    """steps: whether the images of a group start from the same noise, so that they differ by the window alone."""
    keep: float = 1.0
    """Share of a group that is trained on: its highest and lowest advantages (PODS, arXiv 2504.13818)."""
    updates: int = 1
    """Optimiser steps an iteration, each on its share of the prompts."""
    lr: float = 2e-3
    """Learning rate of AdamW at the start; it falls linearly to 0 over the run."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    clip: float = 1e-3
    """Clip range of the ratio, on the scale of log-probabilities averaged over dimensions."""
    advantage_clip: float = 5.0
    """Advantages are clipped to plus or minus this."""
    kl: float = 1.0
    """Weight of the divergence from the reference; 0 skips the reference's forwards. With "steps", whose divergence is
    larger, 0.04 is usual."""
    reference_guidance: float = 1.5
    """Krea's g of the reference: what pulls the policy, which samples without guidance, is the guided base."""
    guard: bool = False
    """steps: GRPO-Guard: ratios without their bias, comparable between steps of different noise."""
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
            "grpo.keep must lie above 0 and at most 1": 0 < self.keep <= 1,
            "grpo.draws must be 1 or more": self.draws >= 1,
            "grpo.min_sigma must be 0 or more and below grpo.max_sigma, which is at most 1":
                0 <= self.min_sigma < self.max_sigma <= 1,
            "grpo.window_span must lie between 0 and 1": 0 <= self.window_span <= 1,
            "grpo.updates must lie between 1 and grpo.prompts": 1 <= self.updates <= self.prompts,
            "grpo.clip, grpo.lr, grpo.eta and grpo.advantage_clip must be above 0":
                min(self.clip, self.lr, self.eta, self.advantage_clip) > 0,
            "grpo.ema must lie between 0 and 1, 1 excluded": 0 <= self.ema < 1,
            "grpo.kl and grpo.reference_guidance must be 0 or more": min(self.kl, self.reference_guidance) >= 0,
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


def forward_logp(v_BNC: Float[Tensor, "B N C"], target_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, " B"]:
    """Stand-in for an image's log-likelihood: minus the squared error of its velocity, averaged over dimensions."""
    return -(v_BNC - target_BNC).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A stochastic step from sigma to `sigma_next`, with its mean and log-probability under the old policy."""

    sigma: float
    x_BNC: Tensor
    sigma_next: float
    x_next_BNC: Tensor
    mean_BNC: Tensor
    logp_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Images noised to sigma, with the velocity eps - x0 that leads to them and its likelihood under the old policy."""

    sigma: float
    x_BNC: Tensor
    target_BNC: Tensor
    logp_B: Tensor | None
    """None if the policy does not move before this is trained on: then it is that of training, without gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images of one prompt length that went through the sampler together, and will again in training."""

    rows_B: list[int]
    """Where these images are in the iteration's prompt-major list of P x G."""
    text_BLD: Tensor
    terms: Sequence[Step | Draw]
    """What their likelihood is made of."""
    final_BNC: Tensor
    """Latents at sigma 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What an iteration sampled."""

    batches: list[Batch]
    grid: tuple[int, int]
    empty_LD: Tensor
    """Text of the empty prompt, for guidance."""
    sigma_max: float
    """The noise level after the first step, which some stochastic steps need."""

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
    steps = config.likelihood == "steps"
    window = _window(config, generator) if steps else range(0)
    images = range(len(prompts) * config.group)
    repeat = [i // config.group * config.group if steps and config.shared_noise else i for i in images]
    noise_BNC = initial_noise(model, [seed + i for i in repeat], model.default_size, model.default_size)
    texts = [text for text in conditioner.encode(prompts) for _ in range(config.group)]
    per_batch = max(1, config.batch_size // config.group) * config.group
    draws = [] if steps else _levels_and_noise(config, noise_BNC[:: config.group], generator)
    batches = []
    with policy.acting() as transformer:
        for places, texts_BLD in by_length(texts):
            for rows, text_BLD in zip(in_parts(places, per_batch), texts_BLD.split(per_batch), strict=True):
                x0, taken = _sample(transformer, noise_BNC[rows], text_BLD, levels, window, grid, config, generator)
                groups = [row // config.group for row in rows]
                noised = [(sigma, eps_PNC[groups]) for sigma, eps_PNC in draws]
                terms = taken or _noised(transformer, x0, text_BLD, noised, grid, old=config.updates > 1)
                batches.append(Batch(rows_B=rows, text_BLD=text_BLD, terms=terms, final_BNC=x0))
    (empty_LD,) = conditioner.encode([""])
    return Rollout(batches=batches, grid=grid, empty_LD=empty_LD, sigma_max=float(levels[1]))


def _window(config: GRPOConfig, generator: torch.Generator) -> range:
    starts = max(1, min(round(config.num_steps * config.window_span), config.num_steps - config.window))
    start = int(torch.randint(starts, (), generator=generator))
    return range(start, start + config.window)


def _levels_and_noise(
    config: GRPOConfig, like_PNC: Tensor, generator: torch.Generator
) -> list[tuple[float, Float[Tensor, "P N C"]]]:
    """For each draw a noise level, one in each of equal parts of the range, and noise for each prompt."""
    found = []
    for k in range(config.draws):
        share = (k + float(torch.rand((), generator=generator))) / config.draws
        sigma = config.min_sigma + (config.max_sigma - config.min_sigma) * share
        found.append((sigma, torch.randn(like_PNC.shape, generator=generator).to(like_PNC.device)))
    return found


def _sample(
    transformer: torch.nn.Module, x: Tensor, text_BLD: Tensor, levels: Tensor, window: range, grid: tuple[int, int],
    config: GRPOConfig, generator: torch.Generator,
) -> tuple[Tensor, list[Step]]:  # fmt: skip
    """From noise to sigma 0, and the stochastic steps on the way."""
    taken = []
    for i, (s, s_next) in enumerate(zip(levels.tolist(), levels.tolist()[1:], strict=False)):
        v = velocity(transformer, x, levels[i], text_BLD, grid)
        if i not in window:
            x = euler_step(x, v, s, s_next)
            continue
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        step = STEPS[config.step](x, v, s, s_next, config.eta, noise=noise, sigma_max=float(levels[1]))
        taken.append(Step(
            sigma=s, x_BNC=x, sigma_next=s_next, x_next_BNC=step.x_next, mean_BNC=step.mean, logp_B=step.logp_B
        ))  # fmt: skip
        x = step.x_next
    return x, taken


def _noised(
    transformer: torch.nn.Module, x0: Tensor, text_BLD: Tensor, draws: Sequence[tuple[float, Tensor]],
    grid: tuple[int, int], *, old: bool,
) -> list[Draw]:  # fmt: skip
    terms = []
    for sigma, eps in draws:
        x, target = torch.lerp(x0, eps, sigma), eps - x0
        logp = None
        if old:
            logp = forward_logp(velocity(transformer, x, torch.tensor(sigma, device=x.device), text_BLD, grid), target)
        terms.append(Draw(sigma=sigma, x_BNC=x, target_BNC=target, logp_B=logp))
    return terms


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
    logp_B = forward_logp(v, torch.cat([draw.target_BNC for draw in draws]))
    old = [draw.logp_B for draw in draws if draw.logp_B is not None]
    log_ratio_B = logp_B - (torch.cat(old) if old else logp_B.detach())
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
    config: GRPOConfig,
) -> dict[str, float]:  # fmt: skip
    """The optimiser steps of one iteration.

    Returns means over images and terms of loss, kl and ratio statistics, and the gradient norm.
    Raises FloatingPointError before an optimiser step whose loss or gradient is not finite.
    """
    advantages_B = advantages_B.clamp(-config.advantage_clip, config.advantage_clip)
    if config.keep < 1:
        sampled, advantages_B = extremes(sampled, advantages_B, config)
    totals: dict[str, float] = {}
    parts = _split(sampled, config)
    for part in parts:
        count = sum(len(batch.rows_B) * len(batch.terms) for batch in part.batches)
        optimizer.zero_grad(set_to_none=True)
        for item in replay(policy, part, config):
            loss_B, metrics = term_loss(item, advantages_B[item.rows_B], config)
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


def extremes(
    sampled: Rollout, advantages_B: Float[Tensor, " B"], config: GRPOConfig
) -> tuple[Rollout, Float[Tensor, " B"]]:
    """Only the highest and lowest advantages of each group, as many of either, moved so that they add up to 0."""
    advantages_PG = advantages_B.unflatten(0, (-1, config.group))
    side = max(1, round(config.keep * config.group / 2))
    order_PG = advantages_PG.argsort(dim=1)
    kept_PK = torch.cat([order_PG[:, :side], order_PG[:, -side:]], dim=1)
    mean_P1 = advantages_PG.gather(1, kept_PK).mean(1, keepdim=True)
    kept_B = torch.zeros_like(advantages_PG, dtype=torch.bool).scatter(1, kept_PK, True).flatten()
    batches = [_only(batch, kept_B[batch.rows_B].nonzero().flatten()) for batch in sampled.batches]
    return replace(sampled, batches=batches), (advantages_PG - mean_P1).flatten()


def _only(item: Any, index: Tensor) -> Any:
    """Some rows of a batch and of its terms."""
    changed: dict[str, Any] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value[index]
        elif field.name == "rows_B":
            changed[field.name] = [value[i] for i in index.tolist()]
        elif field.name == "terms":
            changed[field.name] = [_only(term, index) for term in value]
    return replace(item, **changed)


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
