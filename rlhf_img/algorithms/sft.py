"""SFT: a flow model learns images with their captions, by flow matching (arXiv 2210.02747).

For an image x0, noise eps and a noise level sigma, x = (1 - sigma) x0 + sigma eps, and the loss is the squared error of
the velocity:

    mean |v(x, sigma, caption) - (eps - x0)|^2

Its minimum is the flow of the images' law. Some captions are dropped, so that guidance keeps its unconditional half.
Noise levels are uniform and stratified over an image's draws, or logit-normal as in SD3 (arXiv 2403.03206), which
leaves out the ends where there is little to learn.

Left out: a prior-preservation term on images of the model itself (DreamBooth, arXiv 2208.12242); weights of the loss
by noise level, which would be another way to draw the level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.algorithms.rollout import require
from rlhf_img.model.forward import velocity
from rlhf_img.model.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig:
    """Settings of SFT; the defaults are for the embedded model."""

    images: int = 24
    """Images an iteration."""
    draws: int = 4
    """Noise levels of each of them."""
    levels: Literal["uniform", "logit_normal"] = "uniform"
    """How levels are drawn in [0, 1]: evenly, or mostly in the middle."""
    drop: float = 0.1
    """Share of the captions that are replaced by the empty one."""
    lr: float = 3e-3
    """Learning rate (AdamW) at the start; it falls linearly to 0 over the run."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema: float = 0.95
    """Decay, an iteration, of the averaged weights."""
    batch_size: int = 64
    """Images a forward, at most."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        require(
            {
                "sft.images, sft.draws and sft.batch_size must be 1 or more":
                    min(self.images, self.draws, self.batch_size) >= 1,
                "sft.drop is a share between 0 and 1": 0 <= self.drop <= 1,
                "sft.lr and sft.max_grad_norm must be above 0": min(self.lr, self.max_grad_norm) > 0,
                "sft.ema must lie between 0 and 1, 1 excluded": 0 <= self.ema < 1,
            },
            self,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedImages:
    """Images of one size with captions of one length, each at a noise level of its own."""

    x_BNC: Float[Tensor, "B N C"]
    target_BNC: Float[Tensor, "B N C"]
    sigma_B: Float[Tensor, " B"]
    text_BLD: Float[Tensor, "B L D"]
    grid: tuple[int, int]


def draw_levels(
    draws: int, count: int, generator: torch.Generator, levels: Literal["uniform", "logit_normal"]
) -> Float[Tensor, "{draws} {count}"]:
    """Noise levels, one in each of `draws` slices of equal chance for every image."""
    shares = (torch.arange(draws)[:, None] + torch.rand(draws, count, generator=generator)) / draws
    if levels == "uniform":
        return shares
    # Away from the ends of [0, 1], where the quantile is infinite.
    return torch.special.ndtri(shares.double().clamp(1e-6, 1 - 1e-6)).sigmoid().float()


def noised(
    x0_BNC: Float[Tensor, "B N C"], text_BLD: Float[Tensor, "B L D"], sigma_B: Float[Tensor, " B"],
    noise_BNC: Float[Tensor, "B N C"], grid: tuple[int, int],
) -> NoisedImages:  # fmt: skip
    """Clean latents at the levels `sigma_B`, and the velocities there."""
    x_BNC = torch.lerp(x0_BNC, noise_BNC, sigma_B[:, None, None])
    return NoisedImages(x_BNC=x_BNC, target_BNC=noise_BNC - x0_BNC, sigma_B=sigma_B, text_BLD=text_BLD, grid=grid)


def sft_loss(v_BNC: Float[Tensor, "B N C"], target_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, " B"]:
    """mean |v - (eps - x0)|^2, per sample, in float32."""
    return (v_BNC.float() - target_BNC.float()).square().flatten(1).mean(1)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batches: Sequence[NoisedImages], config: SFTConfig
) -> dict[str, float]:
    """One optimiser step. Returns the mean loss, its means in thirds of the noise levels, and the gradient norm.

    Raises FloatingPointError before a step that is not finite.
    """
    count = sum(len(images.sigma_B) for images in batches)
    losses, levels = [], []
    optimizer.zero_grad(set_to_none=True)
    for images in batches:
        for start in range(0, len(images.sigma_B), config.batch_size):
            rows = slice(start, start + config.batch_size)
            with policy.acting() as transformer:
                v = velocity(transformer, images.x_BNC[rows], images.sigma_B[rows], images.text_BLD[rows], images.grid)
                loss_B = sft_loss(v, images.target_BNC[rows])
                (loss_B.sum() / count).backward()  # within the role: checkpointing repeats the forward
            losses.append(loss_B.detach())
            levels.append(images.sigma_B[rows])
    norm = torch.nn.utils.clip_grad_norm_(list(policy.parameters.values()), config.max_grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError("the gradient is not finite: no step was taken")
    optimizer.step()
    policy.update_average(config.ema)
    return {**describe(torch.cat(losses), torch.cat(levels)), "grad_norm": float(norm)}


def describe(loss_B: Float[Tensor, " B"], sigma_B: Float[Tensor, " B"]) -> dict[str, float]:
    """The mean loss, and by third of the noise levels: losses at different levels are not comparable."""
    found = {"loss": float(loss_B.mean())}
    for i, name in enumerate(("low", "middle", "high")):
        inside = (sigma_B * 3).long().clamp_max(2) == i
        if inside.any():
            found[f"loss/{name}"] = float(loss_B[inside].mean())
    return found
