"""AWM (arXiv 2509.25050): GRPO's ratio from the likelihood of the image and not of the sampler's steps; the default.

A flow model gives no likelihood. That of an image x0 under the forward process stands in for it (the same ratio as FPO,
2507.21053): x0 is noised to x = (1 - s) x0 + s eps, u = eps - x0, and at `draws` levels s, each with the advantage,

    log p = -mean |v(x, s) - u|^2        D = mean |v - v_ref|^2

Any sampler will do; rollouts are plain Euler from noise of their own. s and eps are shared by a group, whose advantages
add up to 0, so that what they have in common cancels out of the gradient.

What we changed: where D has a weight, log p is taken to first order about v_ref, because its square pays for moving
ever further from a bad image, and broke long runs. With GRPO's `kl` the loss is then convex in v, and for one batch
least at v_ref + E[A (u - v_ref) | x] / kl, which is where DiffusionNFT (2509.16117) ends too. The levels are a part of
the range; one draw more, below it, has no advantage and D alone, weighed by `hold`: all levels share their weights.
"""

from jaxtyping import Float
from torch import Tensor


def forward_logp(
    v_BNC: Float[Tensor, "B N C"], target_BNC: Float[Tensor, "B N C"], around_BNC: Float[Tensor, "B N C"] | None = None
) -> Float[Tensor, " B"]:
    """Stand-in for an image's log-likelihood: minus the squared error of its velocity, averaged over dimensions.

    With `around`, to first order in v about that velocity: -|a - u|^2 - 2 (a - u) (v - a), where u is the target.
    """
    if around_BNC is None:
        return -(v_BNC - target_BNC).square().flatten(1).mean(1)
    error = around_BNC - target_BNC
    return -(error.square() + 2 * error * (v_BNC - around_BNC)).flatten(1).mean(1)


def log_ratio(
    v_BNC: Float[Tensor, "B N C"], v_old_BNC: Float[Tensor, "B N C"], target_BNC: Float[Tensor, "B N C"],
    v_ref_BNC: Float[Tensor, "B N C"] | None,
) -> Float[Tensor, " B"]:  # fmt: skip
    """log p - log p_old of each image at its level; about v_ref to first order, if there is one."""
    return forward_logp(v_BNC, target_BNC, v_ref_BNC) - forward_logp(v_old_BNC, target_BNC, v_ref_BNC)


def divergence(v_BNC: Float[Tensor, "B N C"], v_ref_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, " B"]:
    """D above: mean |v - v_ref|^2."""
    return -forward_logp(v_BNC, v_ref_BNC)
