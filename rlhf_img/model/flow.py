"""Flow-matching mathematics as pure functions: noise levels, the Euler step, stochastic steps with log-probabilities.

x_s = (1 - s) x0 + s eps with noise level s in [0, 1], 1 = noise; v = eps - x0; a step goes from s to s' < s. Noise
levels are Python floats taken from one table, and all arithmetic is float32, so that a step can be replayed exactly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rlhf_img.errors import RlhfImgError

DISTILLED_MU = 1.15
"""Shift of a distilled checkpoint (Krea 2 Turbo), whatever the resolution."""


def sigmas(
    num_steps: int, num_tokens: int, scheduler_config: Mapping[str, Any], is_distilled: bool
) -> Float[Tensor, "{num_steps}+1"]:
    """The S + 1 noise levels of an S-step sampling of `num_tokens` image tokens: from 1 down to 0, float32.

    Bit for bit what the stock Krea 2 pipeline gets from diffusers' FlowMatchEulerDiscreteScheduler with this config:
    in float32 and in its order, because the time embedding multiplies a rounding difference by 1000.
    Raises RlhfImgError for fewer than 1 step and for schedules Krea 2 does not use.
    """
    if num_steps < 1:
        raise RlhfImgError(f"the number of steps must be at least 1; got {num_steps}")
    config = {
        "base_image_seq_len": 256, "max_image_seq_len": 6400, "base_shift": 0.5, "max_shift": 1.15,
        "time_shift_type": "exponential", "shift": 1.0, "use_dynamic_shifting": False, **scheduler_config,
    }  # fmt: skip
    other = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
    if used := [key for key in (*other, "shift_terminal") if config.get(key)]:
        raise RlhfImgError(f"the model's scheduler sets {', '.join(used)}; only Krea 2's shifted schedule is supported")
    levels: NDArray[np.floating] = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)
    if config["use_dynamic_shifting"]:
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        mu = num_tokens * slope + (config["base_shift"] - slope * config["base_image_seq_len"])
        mu = DISTILLED_MU if is_distilled else mu
        shift = float(math.exp(mu) if config["time_shift_type"] == "exponential" else mu)
        levels = shift / (shift + (1 / levels - 1))
    else:
        shift = float(config["shift"])
        levels = shift * levels / (1 + (shift - 1) * levels)
    return torch.from_numpy(np.append(levels, np.float32(0)))


def euler_step(
    x_BNC: Float[Tensor, "B N C"], v_BNC: Float[Tensor, "B N C"], s: float, s_next: float
) -> Float[Tensor, "B N C"]:
    """x + (s' - s) v in float32: the deterministic step."""
    return x_BNC.float() + (s_next - s) * v_BNC.float()


def second_order(
    v_BNC: Float[Tensor, "B N C"], v_before_BNC: Float[Tensor, "B N C"], s_before: float, s: float, s_next: float
) -> Float[Tensor, "B N C"]:
    """The mean velocity from s to s' on the line through this one and that of the step before (Adams-Bashforth).

    v + (s' - s) / (2 (s - s_before)) (v - v_before): a Euler step with it is of second order, at one call a step.
    """
    return v_BNC + (s_next - s) / (2 * (s - s_before)) * (v_BNC - v_before_BNC)


@dataclass(frozen=True, kw_only=True, slots=True)
class SdeStep:
    """One Gaussian transition x' ~ N(mean, std^2), and how likely x' was."""

    x_next: Float[Tensor, "B N C"]
    mean: Float[Tensor, "B N C"]
    std: float
    """Of the whole transition: where a paper writes std sqrt(-dt), that product."""
    logp_B: Float[Tensor, " B"]
    """log N(x'; mean, std^2), the MEAN over the N C dimensions, not their sum: clip ranges are on this scale."""


Step = Callable[..., SdeStep]


def flow_sde_step(
    x_BNC: Float[Tensor, "B N C"],
    v_BNC: Float[Tensor, "B N C"],
    s: float,
    s_next: float,
    eta: float,
    *,
    noise: Float[Tensor, "B N C"] | None = None,
    x_next: Float[Tensor, "B N C"] | None = None,
    sigma_max: float,
) -> SdeStep:
    """A step of Flow-GRPO's SDE (arXiv 2505.05470), which keeps the marginals of the flow as dt -> 0.

    With dt = s' - s and g = eta sqrt(s / (1 - s)):
    mean = x (1 + g^2 / (2 s) dt) + v (1 + g^2 (1 - s) / (2 s)) dt, std = g sqrt(-dt).

    Args:
        x_BNC, v_BNC: latents at `s` and the velocity there.
        s, s_next: noise levels, 0 <= s_next < s <= 1.
        eta: strength of the noise, > 0; published: 0.7 for SD3.5, 0.9 for FLUX.
        noise: standard normal, to sample x'.  Exactly one of `noise` and `x_next` is given.
        x_next: the x' of an earlier step, to replay: gives its log-probability under this velocity.
        sigma_max: the schedule's second noise level, below 1: stands for s in 1 - s at s = 1, where g is infinite.

    Raises ValueError for levels or arguments out of these ranges. At s' = 0 the final image keeps noise of `std`.
    """
    _check(s, s_next)
    if not s < 1 and not 0 < sigma_max < 1:
        raise ValueError(f"sigma_max must lie between 0 and 1, both excluded; got {sigma_max}")
    dt = s_next - s
    g2 = eta**2 * s / (1 - (s if s < 1 else sigma_max))
    x, v = x_BNC.float(), v_BNC.float()
    mean = x * (1 + g2 / (2 * s) * dt) + v * ((1 + g2 * (1 - s) / (2 * s)) * dt)
    return _transition(mean, math.sqrt(-g2 * dt), noise, x_next)


def dance_sde_step(
    x_BNC: Float[Tensor, "B N C"],
    v_BNC: Float[Tensor, "B N C"],
    s: float,
    s_next: float,
    eta: float,
    *,
    noise: Float[Tensor, "B N C"] | None = None,
    x_next: Float[Tensor, "B N C"] | None = None,
    sigma_max: float,
) -> SdeStep:
    """A step of DanceGRPO's SDE (arXiv 2505.07818): constant noise, marginals kept as dt -> 0.

    With dt = s' - s and score = -(x - (1 - s) x0) / s^2: mean = x + v dt - eta^2 / 2 score dt, std = eta sqrt(-dt).
    Published: eta 0.3. Arguments and errors as in `flow_sde_step`; `sigma_max` is not needed.
    """
    _check(s, s_next)
    dt = s_next - s
    x, v = x_BNC.float(), v_BNC.float()
    score = -(x + (1 - s) * v) / s  # x - (1 - s) x0 is s eps, and eps = x + (1 - s) v
    mean = x + dt * v - (0.5 * eta**2 * dt) * score
    return _transition(mean, eta * math.sqrt(-dt), noise, x_next)


def cps_step(
    x_BNC: Float[Tensor, "B N C"],
    v_BNC: Float[Tensor, "B N C"],
    s: float,
    s_next: float,
    eta: float,
    *,
    noise: Float[Tensor, "B N C"] | None = None,
    x_next: Float[Tensor, "B N C"] | None = None,
    sigma_max: float,
) -> SdeStep:
    """A coefficients-preserving step, Flow-CPS (arXiv 2509.05952): the noise level after it is s' for every eta.

    std = s' sin(eta pi / 2), mean = (1 - s') x0 + sqrt(s'^2 - std^2) eps with x0 = x - s v, eps = x + (1 - s) v.
    Exact where the data is one point. Otherwise the predicted eps varies less than 1 and each step changes the
    variance by -s'^2 (1 - cos(eta pi / 2))^2 (1 - Var eps) even as dt -> 0: fourth order in eta.
    Published: eta 0.8, with log-probability -mean (x' - mean)^2; here it is the same Gaussian density as in the other
    steps, larger by 1 / (2 std^2): a published clip range grows by that factor.
    Arguments as in `flow_sde_step`, eta in (0, 1]; `sigma_max` is not needed. Raises ValueError at s' = 0, where std
    is 0 and there is no density: take the last step with `euler_step`.
    """
    _check(s, s_next)
    if not 0 < eta <= 1:
        raise ValueError(f"eta of a CPS step must lie in (0, 1]; got {eta}")
    x, v = x_BNC.float(), v_BNC.float()
    std = s_next * math.sin(eta * math.pi / 2)
    mean = (1 - s_next) * (x - s * v) + s_next * math.cos(eta * math.pi / 2) * (x + (1 - s) * v)
    return _transition(mean, std, noise, x_next)


STEPS: dict[str, Step] = {"flow_sde": flow_sde_step, "cps": cps_step, "dance": dance_sde_step}


def _check(s: float, s_next: float) -> None:
    if not 0 <= s_next < s <= 1:
        raise ValueError(f"noise levels must fall within [0, 1]; got a step from {s} to {s_next}")


def _transition(mean: Tensor, std: float, noise: Tensor | None, x_next: Tensor | None) -> SdeStep:
    if not std > 0:
        raise ValueError("a step without noise has no log-probability: use eta > 0, and euler_step where s' is 0")
    if (noise is None) == (x_next is None):
        raise ValueError("give either noise, to sample, or x_next, to replay")
    if x_next is None:
        assert noise is not None
        # Detached: the log-probability's gradient is through the mean only, in sampling as in replay.
        x_next = (mean + std * noise.float()).detach()
    x_next = x_next.float()
    z = (x_next - mean) / std
    logp = -0.5 * z.square().flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return SdeStep(x_next=x_next, mean=mean, std=std, logp_B=logp)
