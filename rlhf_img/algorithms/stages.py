"""The stages of a student of few steps, and what a critic of each learns.

Stage k goes from the noise level s_k to s = s_{k+1}, where the student lands on x_s. Noised forward to s < tau < s_k it
is x_tau = a x_s + b n. What v*, the critic's velocity there, is regressed on (`CRITIC_TARGETS`):

    ambient  -x_s / (1 - s) + c n, c = (tau + (1 - tau) s^2 / (1 - s)^2) / b: exact for any law of x_s, as in RTDMD and
             LightX2V's phased DMD (code). Its variance grows as s -> 1, and w is its inverse where x0 has variance 1.
    tdm_x0   (x_tau - x0) / tau, the published target. Exact at s = 0; above, only if x0 and the noise that is left in
             x_s are independent. Less variance.
    dmd      n - x0 with x_tau = (1 - tau) x0 + tau n (DMD2, arXiv 2405.14867): exact, but for x0, not for x_s; student
             and critic then both see this x_tau.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """For each image its stage, from the noise level `start` down to `end`, and a level tau inside it."""

    index_B: Int[Tensor, " B"]
    start_B: Float[Tensor, " B"]
    end_B: Float[Tensor, " B"]
    tau_B: Float[Tensor, " B"]


def draw_stages(levels_S: Float[Tensor, " S"], count: int, margin: float, generator: torch.Generator) -> Stages:
    """Stages of equal chance, and tau uniform in each but for `margin` of its width at both ends."""
    index_B = torch.randint(len(levels_S) - 1, (count,), generator=generator)
    share_B = margin + (1 - 2 * margin) * torch.rand(count, generator=generator)
    start_B, end_B = levels_S[index_B], levels_S[index_B + 1]
    return Stages(index_B=index_B, start_B=start_B, end_B=end_B, tau_B=end_B + (start_B - end_B) * share_B)


def renoise_coefficients(
    s_B: Float[Tensor, " B"], tau_B: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """a and b of x_tau = a x_s + b n, for s < tau; b^2 as a product, which loses no digits where the two are close."""
    a_B = (1 - tau_B) / (1 - s_B)
    return a_B, ((tau_B - s_B) / (1 - s_B) * (tau_B + a_B * s_B)).sqrt()


@dataclass(frozen=True, kw_only=True, slots=True)
class Landing:
    """What the student arrives at in its stage: x at the stage's end, and the clean image it predicts."""

    x_BNC: Float[Tensor, "B N C"]
    x0_BNC: Float[Tensor, "B N C"]


def land(x_BNC: Float[Tensor, "B N C"], v_BNC: Float[Tensor, "B N C"], stages: Stages) -> Landing:
    """One Euler step from the stage's start to its end, and one to 0."""
    start, end = wide(stages.start_B, x_BNC), wide(stages.end_B, x_BNC)
    return Landing(x_BNC=x_BNC + (end - start) * v_BNC, x0_BNC=x_BNC - start * v_BNC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Noised:
    """A landing noised forward to tau, and what the critic regresses on there."""

    x_BNC: Float[Tensor, "B N C"]
    target_BNC: Float[Tensor, "B N C"]
    """Its expectation, given x, is the velocity of the law that x is drawn from, as far as the target is exact."""
    weight_B: Float[Tensor, " B"]


def ambient(landing: Landing, stages: Stages, noise_BNC: Float[Tensor, "B N C"]) -> Noised:
    """The exact target for x_s noised to tau, whatever the law of x_s."""
    s, tau = stages.end_B, stages.tau_B
    a, b = renoise_coefficients(s, tau)
    c = (tau + (1 - tau) * s**2 / (1 - s) ** 2) / b
    spread = (1 - s) ** 2 + s**2  # the variance of x_s where x0 has variance 1
    weight_B = (b * (1 - s) / tau) ** 2 * (a**2 * spread + b**2) / spread
    x = wide(a, noise_BNC) * landing.x_BNC + wide(b, noise_BNC) * noise_BNC
    target = wide(c, noise_BNC) * noise_BNC - landing.x_BNC / wide(1 - s, noise_BNC)
    return Noised(x_BNC=x, target_BNC=target, weight_B=weight_B.to(noise_BNC.device))


def tdm_x0(landing: Landing, stages: Stages, noise_BNC: Float[Tensor, "B N C"]) -> Noised:
    """The published target: the student's own prediction of the clean image, seen from x_tau."""
    a, b = renoise_coefficients(stages.end_B, stages.tau_B)
    x = wide(a, noise_BNC) * landing.x_BNC + wide(b, noise_BNC) * noise_BNC
    target = (x - landing.x0_BNC) / wide(stages.tau_B, noise_BNC)
    return Noised(x_BNC=x, target_BNC=target, weight_B=torch.ones(len(x), device=x.device))


def dmd(landing: Landing, stages: Stages, noise_BNC: Float[Tensor, "B N C"]) -> Noised:
    """Flow matching on the predicted clean image, noised from 0 to tau."""
    x = torch.lerp(landing.x0_BNC, noise_BNC, wide(stages.tau_B, noise_BNC))
    weight_B = torch.ones(len(x), device=x.device)
    return Noised(x_BNC=x, target_BNC=noise_BNC - landing.x0_BNC, weight_B=weight_B)


CRITIC_TARGETS: Mapping[str, Callable[[Landing, Stages, Tensor], Noised]] = {
    "ambient": ambient, "tdm_x0": tdm_x0, "dmd": dmd,
}  # fmt: skip
"""By `TDMConfig.critic_target`."""


def wide(value_B: Tensor, like_BNC: Tensor) -> Tensor:
    """A number an image, beside its latents."""
    return value_B.to(like_BNC.device).view(-1, *[1] * (like_BNC.ndim - 1))
