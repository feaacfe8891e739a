"""The artifact reward: how sure it is that nothing in the image is broken that the prompt did not ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from rlhf_img.rewards.artifact_model import WEIGHTS, Detector, load_detector, log_p_clean
from rlhf_img.rewards.defects import CLASSES, permitted
from rlhf_img.rewards.protocol import Images, Verdict
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics.schema import Rubric


@dataclass(frozen=True, kw_only=True)
class ArtifactResult:
    """What the detector saw. probability: of each class, permitted or not. permitted: classes that the prompt asks for.
    heat_hw: float16 in [0, 1], the likeliest defect that is not permitted in each cell of 4 x 4 px."""

    probability: dict[str, float]
    permitted: frozenset[str]
    heat_hw: np.ndarray


def artifact(
    prompts: Sequence[str],
    images: Images,
    *,
    rubrics: Sequence[Rubric | None] | None = None,
    weights: str | None = None,
    **columns: object,
) -> list[Verdict]:
    """P(no structural defect that the prompt does not permit) of each image, in [0, 1]; an `ArtifactResult` in details.

    Grain, blur and other looks are no defects here. rubrics: as of the reward `rubric`; their `permits` drop classes.
    weights: option; a safetensors file to use instead of the shipped one. Raises RlhfImgError if the images are much
    larger or smaller than those the weights were trained on.
    """
    own = rubrics if rubrics is not None else [None] * len(prompts)
    allowed = [permitted(sorted((rubric_of(prompt) if given is None else given).permits))
               for prompt, given in zip(prompts, own, strict=True)]
    allowed_BK = torch.tensor([[name in classes for name in CLASSES] for classes in allowed])
    logits_BK, heat_BKhw = _detector(weights)(images.tensor)
    values = log_p_clean(logits_BK, allowed_BK).exp().tolist()
    heat_Bhw = heat_BKhw.masked_fill(allowed_BK[..., None, None], -torch.inf).sigmoid().amax(dim=1).half().numpy()
    return [
        Verdict(value=value, details=ArtifactResult(
            probability=dict(zip(CLASSES, row, strict=True)), permitted=classes, heat_hw=heat))
        for value, row, classes, heat in zip(values, logits_BK.sigmoid().tolist(), allowed, heat_Bhw, strict=True)
    ]


artifact.range = (0.0, 1.0)  # type: ignore[attr-defined]
artifact.floor = 0.02  # type: ignore[attr-defined]
# Summed as an objective it is hacked at once: an empty image has no defect. As a gate it only caps what is broken.
artifact.role = "gate"  # type: ignore[attr-defined]
artifact.below = 0.8  # type: ignore[attr-defined]


@lru_cache(maxsize=4)
def _detector(weights: str | None) -> Detector:
    return load_detector(WEIGHTS if weights is None else Path(weights))
