"""DiffusionNFT (arXiv 2509.16117): a policy made by telling good images from bad ones in the forward process.

Images are drawn by the old policy with any sampler. An image's advantage A becomes the probability that it is good,
q = 1/2 + clip(A / scale, -1, 1) / 2. The image x0 is noised to x = (1 - s) x0 + s eps, u = eps - x0, and two velocities
are fitted to it, the policy's own step away from the old one and its mirror image:

    v+ = (1 - beta) v_old + beta v        v- = (1 + beta) v_old - beta v
    loss = (scale / beta) (q |v+ - u|^2 / n(v+) + (1 - q) |v- - u|^2 / n(v-)) + kl mean |v - v_ref|^2

With n = 1 and every x its own, it is least at v = v_old + (2 q - 1) (u - v_old) / beta in expectation over what can be
behind x: towards good images, away from bad ones, and at a finite distance. No likelihood and no ratio is needed, and
nothing of the sampler is kept.

n is the sample's own normaliser, without gradient: in terms of the clean image that a velocity predicts, x - s v, the
loss is its squared error over its mean absolute error (`normalise`), which is s |v - u|^2 / mean |v - u| in velocities.

The old policy is an average of the trained one, old <- d old + (1 - d) v after every iteration, with the published
schedules of d (`decay`): it samples, and it is what is evaluated and exported.

What we changed: levels and noise are shared by a group (algorithms/rollout), whose advantages add up to 0, so that what
they have in common cancels out of the gradient; the levels are a part of the range by default, and one draw more, below
them, only holds the policy to the reference (`hold`); `kl` is large enough to say where a run ends. To first order the
gradient is AWM's over n: in the embedded model's first iteration 3 times as large. Left out: guidance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.algorithms.rollout import AverageGradients, Rollout, RolloutConfig, alone, require
from rlhf_img.algorithms.updating import Draws, optimise, split, together, velocities
from rlhf_img.model.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class NFTConfig(RolloutConfig):
    """Settings of DiffusionNFT, with those of its rollouts."""

    section: ClassVar[str] = "nft"
    averaged: ClassVar[bool] = True

    beta: float = 1.0
    """How far v+ and v- lie from the old policy; 1 (one reward) and 0.1 (OCR, several rewards) are published. Smaller
    lets the policy go further from the old one."""
    scale: float = 5.0
    """The advantage of an image that is certainly good."""
    normalise: bool = True
    """Whether a sample's loss is divided by its mean absolute error, so that all levels weigh about the same."""
    decay: Literal["none", "fast", "slow"] = "fast"
    """Of the old policy after iteration i: "none" 0, so that it is always the trained one; "fast" min(0.001 i, 0.5);
    "slow" 0 up to 75, then 0.0075 (i - 75) up to 0.999."""
    kl: float = 0.2
    """Weight of mean |v - v_ref|^2 against the model that the run began from; 0, without `hold`, skips its forwards.
    Published: 1e-4, with rates at which nothing gets far. With that and 2e-3 the embedded model broke after 40
    iterations, for an image's gradient grows with the distance, where AWM's is that at the reference."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        super(NFTConfig, self).__post_init__()  # a dataclass with slots is not the class that a bare super() knows
        require(
            {
                "nft.beta, nft.scale, nft.lr and nft.max_grad_norm must be above 0":
                    min(self.beta, self.scale, self.lr, self.max_grad_norm) > 0,
                "nft.kl must be 0 or more": self.kl >= 0,
            },
            self,
        )  # fmt: skip


def decay(schedule: str, iteration: int) -> float:
    """Share of the old policy that stays after an iteration, counted from 1. Raises KeyError for another schedule."""
    return {
        "none": 0.0,
        "fast": min(0.001 * iteration, 0.5),
        "slow": min(max(0.0, 0.0075 * (iteration - 75)), 0.999),
    }[schedule]


def nft_loss(
    v_BNC: Float[Tensor, "B N C"], v_old_BNC: Float[Tensor, "B N C"], target_BNC: Float[Tensor, "B N C"],
    sigma_B: Float[Tensor, " B"], advantage_B: Float[Tensor, " B"], config: NFTConfig,
) -> Float[Tensor, " B"]:  # fmt: skip
    """The loss above per sample, without the divergence."""
    good_B = (advantage_B / config.scale).clamp(-1, 1) / 2 + 0.5
    ahead_BNC = config.beta * (v_BNC - v_old_BNC)

    def error(v_BNC: Tensor) -> Tensor:
        off = (v_BNC - target_BNC).flatten(1)
        square_B = off.square().mean(1)
        return sigma_B * square_B / off.detach().abs().mean(1).clamp(min=1e-5) if config.normalise else square_B

    loss_B = good_B * error(v_old_BNC + ahead_BNC) + (1 - good_B) * error(v_old_BNC - ahead_BNC)
    return loss_B * config.scale / config.beta


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, sampled: Rollout, advantages_B: Float[Tensor, " B"],
    config: NFTConfig, iteration: int, average_gradients: AverageGradients = alone,
) -> dict[str, float]:  # fmt: skip
    """The optimiser steps of an iteration, counted from 1, and that of the old policy, which is the policy's average.

    `average_gradients` is called before each, for runs of several processes. Returns means over images and draws of
    loss, kl and the distance from the old policy, and the gradient norm. Raises FloatingPointError before an optimiser
    step whose gradient is not finite.
    """

    def losses(part: Rollout) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
        for batch in part.batches:
            for draws in together(batch, config.batch_size):
                yield *draws_loss(policy, part, draws, advantages_B[draws.rows_B], config), draws.weight_B

    totals: dict[str, float] = {}
    for part in (parts := split(sampled, config.updates)):
        means = optimise(policy, optimizer, part, losses, config.max_grad_norm, average_gradients)
        totals = {name: totals.get(name, 0.0) + value / len(parts) for name, value in means.items()}
    policy.update_average(decay(config.decay, iteration))
    return totals


def draws_loss(
    policy: Policy, part: Rollout, draws: Draws, advantage_B: Tensor, config: NFTConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each draw, with a graph, and metrics without."""
    guidance = 0.0 if config.kl or config.holds else None
    v, v_ref = velocities(policy, part, draws.x_BNC, draws.sigma_B, draws.text_BLD, guidance)
    v_old = v.detach() if draws.old_BNC is None else draws.old_BNC
    loss_B = nft_loss(v, v_old, draws.target_BNC, draws.sigma_B, advantage_B, config)
    kl_B = torch.zeros_like(loss_B) if v_ref is None else (v - v_ref).square().flatten(1).mean(1)
    held_B = draws.sigma_B < config.min_sigma
    loss_B = torch.where(held_B, config.hold * kl_B, loss_B + config.kl * kl_B)
    away_B = (v.detach() - v_old).square().flatten(1).mean(1)
    return loss_B, {"loss": loss_B.detach(), "kl": kl_B.detach(), "old_distance": away_B}
