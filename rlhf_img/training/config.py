"""The settings that runs of all algorithms share, with what they mean; each algorithm's own are in its file here."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.compute import ComputeConfig
from rlhf_img.model.policy import LoRAConfig
from rlhf_img.training.evaluate import EvalConfig
from rlhf_img.training.watch import SentinelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What every training run has, of whatever algorithm."""

    model: str = "playground"
    """"playground", a folder that holds a diffusers Krea 2 pipeline, or a hub id such as "krea/Krea-2-Raw"."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the frozen base and of what is computed with it; "auto": bfloat16 where the hardware multiplies it. Adapters,
    the sampler's steps and likelihoods are float32 in any case."""
    rewards: str | tuple[dict[str, object], ...] = "rubric,artifact"
    """Rewards and weights, "rubric:2,artifact,my_rewards.py:neon", or a list with options."""
    prompts: str | None = None
    """Training prompts: .txt, .jsonl, .yaml, .parquet, a dataset's folder, a pool (.sqlite); None: the playground's."""
    eval_prompts: str | None = None
    """File of held-out prompts, as above; None: the playground's, or a share of `prompts`."""
    steps: int = 80
    """Iterations."""
    seed: int = 0
    """Of the adapter, the order of prompts and all noise. Evaluation seeds do not depend on it."""
    full: bool = False
    """Train all weights of the transformer's blocks instead of a LoRA; needs room for a second copy of them."""
    shard: bool = False
    """Share the blocks' weights out over the processes (FSDP2) instead of a copy on each: for models that do not fit.
    The run's folder must then be one that every process sees."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """So many of the newest stay, and the last one that was taken while all sentinels were inside of their bands."""
    sample_every: int = 20
    """Iterations between grids of sample images; 0: only before and after."""
    samples: int = 12
    """Held-out prompts in those grids."""
    tracker: str = "tensorboard"
    """A tracker of accelerate ("tensorboard", "wandb", ...) or "none". metrics.jsonl is written in any case."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sentinels: SentinelConfig = field(default_factory=SentinelConfig)

    def __post_init__(self) -> None:
        """Raises RlhfImgError for counts out of range."""
        for name, least in (
            ("steps", 1), ("checkpoint_every", 1), ("keep_checkpoints", 1), ("sample_every", 0), ("samples", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise RlhfImgError(f"{name} must be {least} or more; got {getattr(self, name)}")
