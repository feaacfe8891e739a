"""Before the first optimiser step: are the log-probabilities of training those of the rollout?

The policy has not changed yet, so every ratio must be 1. Where it is not (another kernel, dtype, batch shape or
schedule in training than in rollout), the clip range would cut on noise and the run would learn from it.
"""

import torch

from rlhf_img.algorithms.grpo import GRPOConfig, replay
from rlhf_img.algorithms.rollout import Rollout
from rlhf_img.errors import RunStopped
from rlhf_img.model.policy import Policy


def check_ratios(policy: Policy, sampled: Rollout, config: GRPOConfig) -> float:
    """The largest |ratio - 1| of a rollout under the policy that made it.

    Raises RunStopped (exit code 3) if it is not finite or above the clip range.
    """
    with torch.enable_grad():
        worst = torch.stack([(r.log_ratio_B.detach().exp() - 1).abs().max() for r in replay(policy, sampled, config)])
    deviation = float(worst.max())
    if not deviation <= config.clip:
        raise RunStopped(
            f"the pre-flight check refuses to train: log-probabilities of training differ from those of the rollout, "
            f"max |ratio - 1| = {deviation:.3g} where the clip range is {config.clip:.3g}. Use one dtype and one "
            f"attention backend in both (float32 on a CPU), or raise grpo.clip above the noise"
        )
    return deviation
