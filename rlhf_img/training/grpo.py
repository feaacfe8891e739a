"""A run of GRPO."""

from dataclasses import dataclass, field

from torch import Tensor

from rlhf_img.algorithms import grpo
from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import Rollout
from rlhf_img.training import distributed, online
from rlhf_img.training.loop import Job
from rlhf_img.training.online import OnlineConfig, Parts
from rlhf_img.training.preflight import check_ratios


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(OnlineConfig):
    """A GRPO run. Every field can be set in a run file or as `key=value`, nested ones with dots: `grpo.lr=1e-4`."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    @property
    def method(self) -> GRPOConfig:
        """The settings of the algorithm."""
        return self.grpo


def prepare(config: Config) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any work."""

    def learn(parts: Parts, sampled: Rollout, advantages_B: Tensor, step: int) -> dict[str, float]:
        checked = {"preflight/max_dev": check_ratios(parts.policy, sampled, config.grpo)} if step == 1 else {}
        average = distributed.average_gradients
        return checked | grpo.update(parts.policy, parts.optimizer, sampled, advantages_B, config.grpo, average)

    return online.prepare(config, learn)
