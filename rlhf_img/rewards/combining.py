"""Many rewards into one advantage: gates, normalisation, weights. Pure functions of tensors.

Axes: P prompts, G images of one prompt, K rewards. NaN is unscored: it is left out of every statistic, and an image
without a value from a reward gets advantage 0 from it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.rewards.protocol import Reward
from rlhf_img.rewards.signal import mute
from rlhf_img.rubrics.schema import Gate

Metrics = dict[str, float]


def center_in_group(rewards_PGK: Float[Tensor, "P G K"]) -> Float[Tensor, "P G K"]:
    """Rewards minus their group's mean over the scored images; 0 where unscored, exactly 0 where all are equal."""
    scored = ~rewards_PGK.isnan()
    # From the group's minimum, so that equal rewards leave no rounding error to be blown up.
    low = rewards_PGK.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True)
    shifted = torch.where(scored, rewards_PGK - low, 0.0)
    mean = shifted.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(scored, shifted - mean, 0.0)


def normalize_in_group(
    rewards_PGK: Float[Tensor, "P G K"], floors_K: Float[Tensor, " K"]
) -> Float[Tensor, "P G K"]:
    """z = (r - mean) / max(std, floor), with the group's mean and population std over the scored images; 0 if unscored.

    With the floor, a reward that is constant but for noise stays near 0 instead of becoming a unit-variance signal.
    """
    scored = (~rewards_PGK.isnan()).sum(dim=1, keepdim=True).clamp_min(1)
    centered = center_in_group(rewards_PGK)
    std = (centered.square().sum(dim=1, keepdim=True) / scored).sqrt()
    return centered / std.maximum(floors_K)


def gdpo(
    rewards_PGK: Float[Tensor, "P G K"], weights_K: Float[Tensor, " K"], floors_K: Float[Tensor, " K"]
) -> tuple[Float[Tensor, "P G"], Metrics]:
    """GDPO: each reward normalised within its group, weighed, summed, then normalised over the batch.

        z_k = (r_k - mean_group) / max(std_group, floor_k),    C = sum_k w_k z_k,    A = C / max(std_batch(C), |w|)

    The batch mean of C is 0, as every group's is. |w| = sqrt(sum_k w_k^2) is the std that independent rewards with full
    spread would have: the published formula divides by std_batch(C) alone, which would blow a batch of ties and
    noise up to unit variance again and undo the floors. So a batch is scaled down, never up.

    Args: rewards_PGK, NaN where unscored; weights_K >= 0, not all 0; floors_K > 0 in each reward's own units.
    Returns: advantages (P, G), finite; metrics `tie_rate`, `zero_spread_groups` (see `ties`) and `advantage_std`.
    Source: GDPO, Liu et al. 2026, arXiv:2601.05242.
    """
    _check_weights(weights_K, floors_K)
    combined = normalize_in_group(rewards_PGK, floors_K) @ weights_K
    std = (combined - combined.mean()).square().mean().sqrt()
    advantages = combined / std.maximum(weights_K.norm())
    return advantages, ties(rewards_PGK, floors_K) | {"advantage_std": advantages.std(correction=0).item()}


def weighted_sum(
    rewards_PGK: Float[Tensor, "P G K"], weights_K: Float[Tensor, " K"], floors_K: Float[Tensor, " K"]
) -> tuple[Float[Tensor, "P G"], Metrics]:
    """The plain alternative: rewards weighed and summed in their own units, then normalised within the group.

        T = sum_k w_k (r_k - mean_group),    A = T / max(std_group(T), |w floor|)

    A reward with a wider spread counts for more. An unscored value counts as its group's mean. Arguments and results
    as of `gdpo`. Source: GRPO, Shao et al. 2024, arXiv:2402.03300.
    """
    _check_weights(weights_K, floors_K)
    total = center_in_group(rewards_PGK) @ weights_K
    scored = (~rewards_PGK.isnan()).any(dim=-1).sum(dim=1, keepdim=True).clamp_min(1)
    std = (total.square().sum(dim=1, keepdim=True) / scored).sqrt()
    advantages = total / std.maximum((weights_K * floors_K).norm())
    return advantages, ties(rewards_PGK, floors_K) | {"advantage_std": advantages.std(correction=0).item()}


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Metrics]]] = {"gdpo": gdpo, "sum": weighted_sum}


def ties(rewards_PGK: Float[Tensor, "P G K"], floors_K: Float[Tensor, " K"]) -> Metrics:
    """How much there is to learn from: a tie is a pair of one group that no reward separates by more than its floor.

    Returns `tie_rate`, the share of same-prompt pairs that are ties, and `zero_spread_groups`, the share of groups with
    nothing but ties; 1.0 for groups of one image. A pair of which a value is missing is not separated by that reward.
    """
    prompts, group, _ = rewards_PGK.shape
    first, second = torch.triu_indices(group, group, offset=1)
    if group < 2 or prompts == 0:
        return {"tie_rate": 1.0, "zero_spread_groups": 1.0}
    separated = (rewards_PGK[:, first] - rewards_PGK[:, second]).abs() > floors_K
    tied = ~separated.any(dim=-1)
    return {"tie_rate": tied.double().mean().item(), "zero_spread_groups": tied.all(dim=1).double().mean().item()}


def apply_gates(
    rewards_PGK: Float[Tensor, "P G K"],
    rewards: Sequence[Reward],
    prompt_gates: Sequence[Sequence[Gate]] | None = None,
) -> tuple[Float[Tensor, "P G K"], Metrics]:
    """Caps the rewards of images that a gate has caught, before anything is normalised.

    Where the gate's reward is below its threshold, every objective k becomes

        min(r_k, low_k + cap (high_k - low_k))    with its declared range [low_k, high_k].

    So a caught image ranks low whatever single rewards say, and images that are all caught still differ below the cap.
    An objective that is itself the gate (of role "both", or named by a rubric) is not capped by it: its slope is the
    way back through the gate.
    An unscored gate catches nothing.

    Args: rewards_PGK, K following `rewards`; prompt_gates: P lists, gates of each prompt's rubric; one
    that names a reward absent from this run is inactive and counted.
    Returns: the capped rewards, all K of them; metrics `gate/<name>/caught` (share of images), `gate/<name>/inactive`.
    Raises RlhfImgError if an objective to be capped has no finite range.
    """
    names = [reward.name for reward in rewards]
    out = rewards_PGK.clone()
    caught: dict[str, int] = {reward.name: 0 for reward in rewards if reward.is_gate}
    inactive: dict[str, int] = {}
    own = [Gate(reward=r.name, below=r.below, cap=r.cap) for r in rewards if r.is_gate]
    for p in range(len(out)):
        for gate in [*own, *(prompt_gates[p] if prompt_gates is not None else ())]:
            if gate.reward not in names:
                inactive[gate.reward] = inactive.get(gate.reward, 0) + 1
                continue
            closed = rewards_PGK[p, :, names.index(gate.reward)] < gate.below  # False where NaN
            caught[gate.reward] = caught.get(gate.reward, 0) + int(closed.sum())
            for k, reward in enumerate(rewards):
                if reward.is_objective and reward.name != gate.reward:
                    # torch.minimum would keep NaN too, but clamp says what is meant.
                    out[p, closed, k] = out[p, closed, k].clamp(max=_ceiling(reward, gate.cap))
    images = max(1, out.shape[0] * out.shape[1])
    metrics = {f"gate/{name}/caught": count / images for name, count in caught.items()}
    return out, metrics | {f"gate/{name}/inactive": float(count) for name, count in inactive.items()}


def advantages(
    rewards: Sequence[Reward],
    rewards_PGK: Float[Tensor, "P G K"],
    *,
    method: str = "gdpo",
    prompt_gates: Sequence[Sequence[Gate]] | None = None,
    noise: Mapping[str, float] | None = None,
) -> tuple[Float[Tensor, "P G"], Metrics]:
    """From raw rewards to advantages: gates, then the objectives combined by a method of `METHODS`.

    K follows `rewards`. noise: measured repeat noise by reward, in its units (see `signal.repeat_noise`): a group in
    which a reward's spread is not above it gets no advantage from this reward; `reward/<name>/below_noise` is the share
    of such groups. Returns advantages (P, G), finite, and flat metrics for the log. Raises RlhfImgError for an unknown
    method or a run without an objective.
    """
    if method not in METHODS:
        raise RlhfImgError(f'no way of combining rewards is called "{method}"; {did_you_mean(method, METHODS)}')
    objectives = [k for k, reward in enumerate(rewards) if reward.is_objective]
    if not objectives:
        raise RlhfImgError("no reward of this run is an objective; at least one must be")
    values = rewards_PGK.float()
    gated, gate_metrics = apply_gates(values, rewards, prompt_gates)
    weights = values.new_tensor([rewards[k].weight for k in objectives])
    floors = values.new_tensor([rewards[k].floor for k in objectives])
    noises = values.new_tensor([(noise or {}).get(rewards[k].name, 0.0) for k in objectives])
    heard = mute(gated[..., objectives], noises)
    result, metrics = METHODS[method](heard, weights, floors)
    muted = (heard.isnan() & ~gated[..., objectives].isnan()).any(dim=1).double().mean(dim=0).tolist()
    quiet = {f"reward/{rewards[k].name}/below_noise": s for k, s, n in zip(objectives, muted, noises, strict=True) if n}
    return result, describe(rewards, values) | gate_metrics | quiet | metrics


def extremes(
    advantages_PG: Float[Tensor, "P G"], count: int
) -> tuple[Float[Tensor, "P G"], Bool[Tensor, "P G"]]:
    """Of each group the count/2 images of highest and of lowest advantage: they carry most of what a group tells.

    Returns advantages whose mean over those of a group is 0, and 0 for the others, and which they are. A count of 0, or
    one that is not below the group's, keeps all.
    Source: max-variance down-sampling, PODS, Xu et al. 2025, arXiv:2504.13818.
    """
    if count == 0 or count >= advantages_PG.shape[1]:
        return advantages_PG, torch.ones_like(advantages_PG, dtype=torch.bool)
    order = advantages_PG.argsort(dim=1, stable=True)
    ends = torch.cat([order[:, : count // 2], order[:, order.shape[1] - count // 2 :]], dim=1)
    kept_PG = torch.zeros_like(advantages_PG, dtype=torch.bool).scatter_(1, ends, True)
    mean = advantages_PG.gather(1, ends).mean(dim=1, keepdim=True)
    return torch.where(kept_PG, advantages_PG - mean, 0.0), kept_PG


def describe(rewards: Sequence[Reward], rewards_PGK: Float[Tensor, "P G K"]) -> Metrics:
    """For each reward: `reward/<name>/mean`, `/std` over all scored images, `/group_std` (mean over groups of the std
    within) and `/unscored` (share). A reward that scored nothing has only `/unscored`: there is no mean to report."""
    metrics: Metrics = {}
    for k, reward in enumerate(rewards):
        values = rewards_PGK[..., k : k + 1]
        known = values[~values.isnan()]
        metrics[f"reward/{reward.name}/unscored"] = 1 - known.numel() / max(1, values.numel())
        if known.numel():
            scored = (~values.isnan()).sum(dim=1)
            spread = (center_in_group(values).square().sum(dim=1) / scored.clamp_min(1)).sqrt()[scored > 0]
            metrics[f"reward/{reward.name}/mean"] = known.mean().item()
            metrics[f"reward/{reward.name}/std"] = known.std(correction=0).item()
            metrics[f"reward/{reward.name}/group_std"] = spread.mean().item()
    return metrics


def _ceiling(reward: Reward, cap: float) -> float:
    low, high = reward.range
    if not math.isfinite(high - low):
        raise RlhfImgError(
            f"reward {reward.name} has the range {reward.range}, and a gate can cap only a share of a finite range. "
            f"Declare a finite range, or leave the gate out"
        )
    return low + cap * (high - low)


def _check_weights(weights_K: Tensor, floors_K: Tensor) -> None:
    if not (weights_K >= 0).all() or not (weights_K > 0).any():
        raise RlhfImgError(f"weights are at least 0 and not all 0; given {weights_K.tolist()}")
    if not (floors_K > 0).all():
        raise RlhfImgError(f"floors are above 0; given {floors_K.tolist()}")
