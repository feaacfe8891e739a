"""What a group of images has to teach: its score, its spread, and the noise below which a spread means nothing.

Axes as in `combining`: P prompts, G images of one prompt, K rewards. NaN is unscored.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.rewards.protocol import Images, Reward
from rlhf_img.rewards.scoring import score

REPEATS = 4
"""How often each image is scored to see the noise of a reward."""
_FLOORS = 50
"""Floors in the range of a reward that declares no floor; the unit of one that has no finite range."""


def group_std(values_PGK: Float[Tensor, "P G K"]) -> Float[Tensor, "P K"]:
    """Population standard deviation over the scored images of each group; 0 for one image or none."""
    scored = (~values_PGK.isnan()).sum(dim=1)
    centered = torch.where(values_PGK.isnan(), 0.0, values_PGK - values_PGK.nanmean(dim=1, keepdim=True))
    # From a value of the group: equal rewards must give exactly 0, and their mean is off by rounding.
    equal = values_PGK.nan_to_num(nan=-math.inf).amax(dim=1) == values_PGK.nan_to_num(nan=math.inf).amin(dim=1)
    std = (centered.square().sum(dim=1) / scored.clamp_min(1)).sqrt()
    return torch.where(equal | (scored == 0), 0.0, std)


def mute(values_PGK: Float[Tensor, "P G K"], noise_K: Float[Tensor, " K"]) -> Float[Tensor, "P G K"]:
    """Values with NaN wherever a reward's spread within a group is not above its repeat noise (where that is above 0).

    Such differences would come out otherwise if the same images were scored again: as unscored, they give no advantage.
    """
    quiet = (group_std(values_PGK) <= noise_K) & (noise_K > 0)
    return torch.where(quiet[:, None], math.nan, values_PGK)


def learnable(
    rewards: Sequence[Reward], values_PGK: Float[Tensor, "P G K"], noise: Mapping[str, float]
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Score, variance and, as 1 or 0, whether there was no spread, of each group.

    score: the objectives on their ranges, in [0, 1], weighed, mean over images; NaN where a range is infinite.
    variance: theirs within the group, weighed, without bias (n - 1), so that for a reward that passes with rate p it is
    p (1 - p) on average. A reward of infinite range counts in 50 of its floors, which is what a range is by default.
    No spread: no objective's std is above its floor and its repeat noise. All NaN where no objective scored two images.

    Args: rewards, K of them; values_PGK after gates; noise: repeat noise by reward, see `repeat_noise`.
    """
    kept = [k for k, reward in enumerate(rewards) if reward.is_objective]
    some, values = [rewards[k] for k in kept], values_PGK[..., kept].double()
    ranges = values.new_tensor([r.range[1] - r.range[0] for r in some])
    floors = values.new_tensor([r.floor for r in some])
    lows = values.new_tensor([r.range[0] for r in some])
    units = torch.where(ranges.isfinite(), ranges, _FLOORS * floors)
    weights = values.new_tensor([r.weight for r in some])
    scored = (~values.isnan()).sum(dim=1)
    std = group_std(values)
    variance = (std / units).square() * scored / (scored - 1).clamp_min(1)
    known = torch.where(scored > 1, weights, 0.0)
    total = known.sum(dim=1)  # 0 where no reward scored two images, and 0 / 0 is NaN
    means = ((values.nanmean(dim=1) - lows) / units).nan_to_num(nan=0.0, posinf=math.nan, neginf=math.nan)
    mean = torch.where(ranges.isfinite().all(), (known * means).sum(dim=1) / total, math.nan)
    least = torch.maximum(floors, values.new_tensor([noise.get(r.name, 0.0) for r in some]))
    flat = torch.where(total > 0, (std <= least).all(dim=1).double(), math.nan)
    return mean, (known * variance).sum(dim=1) / total, flat


def repeat_noise(
    rewards: Sequence[Reward], prompts: Sequence[str], images: Images, columns: Mapping[str, Sequence[object]],
    group_size: int,
) -> dict[str, float]:
    """The standard deviation of each objective's value when it scores the same image again, in its own units.

    Images, each `REPEATS` times, pooled without bias; exactly 0 for a reward that always says the same. A reward that
    scored none of them twice is left out. Arguments as of `score`, whose errors this raises.
    """
    some = [reward for reward in rewards if reward.is_objective]
    values_RBK = torch.stack([
        score(some, prompts, images, columns, group_size=group_size, max_unscored=1.0).values_BK
        for _ in range(REPEATS)
    ]).double()  # fmt: skip
    freedom = ((~values_RBK.isnan()).sum(dim=0) - 1).clamp_min(0)
    squares = group_std(values_RBK.transpose(0, 1)).square() * (freedom + 1)
    return {
        reward.name: math.sqrt(squares[:, k].sum().item() / total)
        for k, reward in enumerate(some) if (total := freedom[:, k].sum().item())
    }  # fmt: skip
