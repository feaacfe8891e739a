"""What an iteration samples, and what the likelihood of its images is made of.

For each prompt a group of images is drawn. Then either every image is noised to a few levels (`likelihood:
forward`), or a window of the sampler's steps was stochastic and is kept (`likelihood: steps`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import STEPS, euler_step, second_order, sigmas
from rlhf_img.model.forward import in_batches, velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.lora import drawing
from rlhf_img.model.policy import Policy
from rlhf_img.model.sampling import initial_noise

HELD_EVERY = 4
"""Of a batch, one image of so many has the draw that is held: it has no advantage, and so little noise."""

AverageGradients = Callable[[list[nn.Parameter]], None]
"""Makes the gradients of all processes of a run one."""


def alone(parameters: list[nn.Parameter]) -> None:
    """The gradients of a run of one process are what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How groups are sampled; the defaults are those that the embedded model's results were made with."""

    section: ClassVar[str]
    """What the settings are called in a run file."""
    averaged: ClassVar[bool] = False
    """Whether the policy's average draws the images, so that its velocities are kept beside those of the policy."""

    prompts: int = 8
    """P, prompts an iteration."""
    group: int = 16
    """G, images a prompt."""
    trained: int = 8
    """Of a group, so many images at most are trained on, half of them those of highest, half those of lowest
    advantage. 0: all."""
    num_steps: int = 6
    """S, denoising steps in a rollout: of second order where no step is stochastic."""
    draws: int = 4
    """Noise levels at which an image is trained, one in each of so many equal parts of the range."""
    min_sigma: float = 0.7
    """The lowest noise level of a draw."""
    max_sigma: float = 0.9
    """The highest."""
    hold: float = 0.2
    """Weight of the divergence from the reference in one draw more, at a level below `min_sigma`: what no draw trains
    changes all the same, since all levels share their weights. Of what is trained a quarter stands for all. 0: none."""
    updates: int = 1
    """Optimiser steps an iteration, each on its share of the prompts."""
    batch_size: int = 128
    """Images a forward, at most."""

    @property
    def holds(self) -> bool:
        """Whether there is one draw more, at which the policy is held to the reference."""
        return self.hold > 0 and self.min_sigma > 0

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        name = self.section
        require(
            {
                f"{name}.prompts must be 1 or more": self.prompts >= 1,
                f"{name}.group must be 2 or more: a group of one has no spread": self.group >= 2,
                f"{name}.trained must be an even number, 0 or more": self.trained >= 0 and self.trained % 2 == 0,
                f"{name}.num_steps must be 1 or more": self.num_steps >= 1,
                f"{name}.draws must be 1 or more": self.draws >= 1,
                f"{name}.min_sigma must be 0 or more and below {name}.max_sigma, which is at most 1":
                    0 <= self.min_sigma < self.max_sigma <= 1,
                f"{name}.hold must be 0 or more": self.hold >= 0,
                f"{name}.updates must lie between 1 and {name}.prompts": 1 <= self.updates <= self.prompts,
                f"{name}.batch_size must be 1 or more": self.batch_size >= 1,
            },
            self,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsConfig(RolloutConfig):
    """Rollouts of which a window of steps may be stochastic."""

    likelihood: Literal["forward", "steps"] = "forward"
    """Of the image under the forward process, at `draws` noise levels, or of the stochastic steps that made it."""
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

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        super(StepsConfig, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        name = self.section
        require(
            {
                f"{name}.window must lie between 1 and {name}.num_steps - 1: the last step is deterministic":
                    1 <= self.window < self.num_steps,
                f"{name}.window_span must lie between 0 and 1": 0 <= self.window_span <= 1,
                f"{name}.eta must be above 0": self.eta > 0,
            },
            self,
        )  # fmt: skip


def require(rules: Mapping[str, bool], given: object) -> None:
    """Raises RlhfImgError with the first rule that is not met."""
    for rule, met in rules.items():
        if not met:
            raise RlhfImgError(f"{rule}; got {given}")


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
    """Images noised to sigma, with the velocity eps - x0 that leads to them and that of the old policy."""

    sigma: float
    rows: range
    """Which of the batch's images they are."""
    x_BNC: Tensor
    target_BNC: Tensor
    old_BNC: Tensor | None
    """None if the policy does not move before this is trained on: then it is that of training, without gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images of one prompt length that went through the sampler together, and will again in training."""

    rows_B: list[int]
    """Where these images are in the iteration's prompt-major list of P x G."""
    text_BLD: Tensor
    terms: Sequence[Step | Draw]
    """What their likelihood is made of; draws come with `noised`."""
    final_BNC: Tensor
    """Latents at sigma 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What an iteration sampled."""

    batches: list[Batch]
    levels: Sequence[tuple[float, Tensor]]
    """For each draw its noise level, and noise [P, N, C] that a group shares; empty if the terms are steps."""
    grid: tuple[int, int]
    empty_LD: Tensor
    """Text of the empty prompt, for guidance."""
    sigma_max: float
    """The noise level after the first step, which some stochastic steps need."""

    def latents(self) -> Float[Tensor, "B N C"]:
        """Final latents in prompt-major order."""
        rows = torch.tensor([i for batch in self.batches for i in batch.rows_B])
        return torch.cat([batch.final_BNC for batch in self.batches])[rows.argsort()]


@drawing()
def rollout(
    model: Model, policy: Policy, conditioner: Conditioner, prompts: Sequence[str], config: RolloutConfig, seed: int,
    places: Sequence[int] | None = None, sampled: Callable[[Batch], None] = lambda batch: None,
) -> Rollout:  # fmt: skip
    """Samples G images for each prompt. The same arguments and weights give the same rollout, to the bit.

    `places`: sample only these of the prompts, with the noise that they have among all of them. `sampled` is called
    with each batch before the next is begun.
    """
    places = range(len(prompts)) if places is None else places
    grid = model.grid(model.default_size, model.default_size)
    levels = sigmas(config.num_steps, grid[0] * grid[1], model.scheduler.config, model.is_distilled)
    generator = torch.Generator().manual_seed(seed)
    steps = config if isinstance(config, StepsConfig) and config.likelihood == "steps" else None
    window = _window(steps, generator) if steps else range(0)
    images = [place * config.group + i for place in places for i in range(config.group)]
    repeat = [i // config.group * config.group if steps and steps.shared_noise else i for i in images]
    noise_BNC = initial_noise(model, [seed + i for i in repeat], model.default_size, model.default_size)
    texts = [text for text in conditioner.encode([prompts[i] for i in places]) for _ in range(config.group)]
    per_batch = images_at_once(config)
    draws = [] if steps else _levels_and_noise(config, (len(prompts), *noise_BNC.shape[1:]), generator)
    generator.manual_seed(seed + images[0])  # what follows differs between processes
    batches = []
    with policy.averaged() if config.averaged else policy.acting() as transformer:
        for rows, text_BLD in in_batches(transformer, texts, per_batch, config.group):
            x0, taken = _sample(transformer, noise_BNC[rows], text_BLD, levels, window, grid, steps, generator)
            batches.append(Batch(rows_B=rows, text_BLD=text_BLD, terms=taken, final_BNC=x0))
            sampled(batches[-1])
    (empty_LD,) = conditioner.encode([""])
    own = [(sigma, eps_PNC[list(places)]) for sigma, eps_PNC in draws]
    return Rollout(batches=batches, levels=own, grid=grid, empty_LD=empty_LD, sigma_max=float(levels[1]))


@torch.no_grad()
def noised(
    policy: Policy, sampled: Rollout, config: RolloutConfig, kept_B: Bool[Tensor, " B"] | None = None
) -> Rollout:  # fmt: skip
    """What is trained on: of a rollout the images that are kept, None: all, each noised to the levels of its draws.

    To be called before the first update, because draws may keep velocities of the policy that sampled.
    """
    old, batches = config.averaged or config.updates > 1, []
    with policy.averaged() if config.averaged else policy.acting() as transformer:
        for whole in sampled.batches:
            batch = whole if kept_B is None else _part(whole, kept_B[whole.rows_B].nonzero().flatten().tolist())
            groups = [row // config.group for row in batch.rows_B]
            draws = [
                _draw(transformer if old else None, batch, sigma, noise_PNC[groups], sampled.grid, config)
                for sigma, noise_PNC in sampled.levels
            ]  # fmt: skip
            batches.append(replace(batch, terms=[*batch.terms, *draws]))
    return replace(sampled, batches=[batch for batch in batches if batch.rows_B])


def images_at_once(config: RolloutConfig) -> int:
    """Images of one prompt length that share a forward, at most: whole groups where they fit, and a batch an update."""
    most = min(config.batch_size, config.prompts // config.updates * config.group)
    return most // config.group * config.group or most


def _window(config: StepsConfig, generator: torch.Generator) -> range:
    starts = max(1, min(round(config.num_steps * config.window_span), config.num_steps - config.window))
    start = int(torch.randint(starts, (), generator=generator))
    return range(start, start + config.window)


def _levels_and_noise(
    config: RolloutConfig, shape: tuple[int, ...], generator: torch.Generator
) -> list[tuple[float, Float[Tensor, "P N C"]]]:
    """For each draw a noise level, one in each of equal parts of the range, and noise for each prompt; with `hold` one
    more, below the range."""
    found = []
    for k in range(config.draws):
        share = (k + float(torch.rand((), generator=generator))) / config.draws
        sigma = config.min_sigma + (config.max_sigma - config.min_sigma) * share
        found.append((sigma, torch.randn(shape, generator=generator)))
    if config.holds:
        sigma = config.min_sigma * float(torch.rand((), generator=generator))
        found.append((sigma, torch.randn(shape, generator=generator)))
    return found


def _sample(
    transformer: torch.nn.Module, x: Tensor, text_BLD: Tensor, levels: Tensor, window: range, grid: tuple[int, int],
    config: StepsConfig | None, generator: torch.Generator,
) -> tuple[Tensor, list[Step]]:  # fmt: skip
    """From noise to sigma 0, and the stochastic steps on the way."""
    taken, before = [], None
    for i, (s, s_next) in enumerate(zip(levels.tolist(), levels.tolist()[1:], strict=False)):
        v = velocity(transformer, x, levels[i], text_BLD, grid)
        if config is None or i not in window:
            x = euler_step(x, v if before is None else second_order(v, *before, s, s_next), s, s_next)
            before = None if config else (v, s)
            continue
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        step = STEPS[config.step](x, v, s, s_next, config.eta, noise=noise, sigma_max=float(levels[1]))
        taken.append(Step(
            sigma=s, x_BNC=x, sigma_next=s_next, x_next_BNC=step.x_next, mean_BNC=step.mean, logp_B=step.logp_B
        ))  # fmt: skip
        x = step.x_next
    return x, taken


def _part(batch: Batch, places: list[int]) -> Batch:
    """Some images of a batch, with the steps that made them."""
    steps = [term for term in batch.terms if isinstance(term, Step)]
    terms = [
        replace(step, x_BNC=step.x_BNC[places], x_next_BNC=step.x_next_BNC[places], mean_BNC=step.mean_BNC[places],
                logp_B=step.logp_B[places])
        for step in steps
    ]  # fmt: skip
    return Batch(
        rows_B=[batch.rows_B[i] for i in places], text_BLD=batch.text_BLD[places], terms=terms,
        final_BNC=batch.final_BNC[places],
    )  # fmt: skip


def _draw(
    old: torch.nn.Module | None, batch: Batch, sigma: float, noise_BNC: Tensor, grid: tuple[int, int],
    config: RolloutConfig,
) -> Draw:  # fmt: skip
    """A batch's images at a noise level, with the velocity of `old` there."""
    every = HELD_EVERY if sigma < config.min_sigma else 1
    x0, noise, text = batch.final_BNC[::every], noise_BNC[::every].to(batch.final_BNC.device), batch.text_BLD[::every]
    rows = range(0, len(batch.rows_B), every)
    x = torch.lerp(x0, noise, sigma)
    v = None if old is None else velocity(old, x, torch.tensor(sigma, device=x.device), text, grid)
    return Draw(sigma=sigma, rows=rows, x_BNC=x, target_BNC=noise - x0, old_BNC=v)
