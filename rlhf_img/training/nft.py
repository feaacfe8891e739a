"""A run of DiffusionNFT."""

from dataclasses import dataclass, field

from torch import Tensor

from rlhf_img.algorithms import nft
from rlhf_img.algorithms.nft import NFTConfig
from rlhf_img.algorithms.rollout import Rollout
from rlhf_img.training import distributed, online
from rlhf_img.training.loop import Job
from rlhf_img.training.online import OnlineConfig, Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(OnlineConfig):
    """An NFT run. Every field can be set in a run file or as `key=value`, nested ones with dots: `nft.lr=1e-4`."""

    nft: NFTConfig = field(default_factory=NFTConfig)

    @property
    def method(self) -> NFTConfig:
        """The settings of the algorithm."""
        return self.nft


def prepare(config: Config) -> tuple[Parts, Job]:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any work."""

    def learn(parts: Parts, sampled: Rollout, advantages_B: Tensor, step: int) -> dict[str, float]:
        average = distributed.average_gradients
        return nft.update(parts.policy, parts.optimizer, sampled, advantages_B, config.nft, step, average)

    return online.prepare(config, learn)
