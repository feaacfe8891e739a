"""The artifact reward: how sure it is that nothing in the image is broken that the prompt did not ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.rewards.allow_list import AllowList, open_list
from rlhf_img.rewards.artifact_model import WEIGHTS, Detector, load_detector, log_p_clean
from rlhf_img.rewards.defects import APPEARANCES, CLASSES, permitted
from rlhf_img.rewards.protocol import Images, Verdict
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics.schema import Rubric


@dataclass(frozen=True, kw_only=True)
class ArtifactResult:
    """What the detector saw. probability: of each class, permitted or not. permitted: classes that the prompt asks for.
    heat_hw: float16 in [0, 1], the likeliest defect that is not permitted in each cell of 4 x 4 px, or of a patch.

    unlisted: with a feature list, what the value would be without it. explained: the features, most active first,
    that the list took away where it cooled the heat map most.
    """

    probability: dict[str, float]
    permitted: frozenset[str]
    heat_hw: np.ndarray
    unlisted: float | None = None
    explained: tuple[str, ...] = ()

    @property
    def against(self) -> dict[str, float]:
        """The probabilities that count: those of classes that are not permitted, the likeliest first."""
        counting = {name: p for name, p in self.probability.items() if name not in self.permitted}
        return dict(sorted(counting.items(), key=lambda item: -item[1]))


def artifact(
    prompts: Sequence[str],
    images: Images,
    *,
    rubrics: Sequence[Rubric | None] | None = None,
    weights: str | None = None,
    appearance: Sequence[str] = (),
    features: str | None = None,
    **columns: object,
) -> list[Verdict]:
    """P(no structural defect that the prompt does not permit) of each image, in [0, 1]; an `ArtifactResult` in details.

    Grain, blur and other looks are no defects here. rubrics: as of the reward `rubric`; their `permits` drop classes.
    weights: option; a safetensors file to use instead of the shipped one. appearance: option; classes of looks that
    are to count as defects where the prompt does not ask for them, of weights that know them. features: option; a
    feature list (see `allow_list`), by which what only a style says of an image is no evidence. Raises RlhfImgError if
    the images are much larger or smaller than those the weights were trained on, or if an option does not fit them.
    """
    detector = _detector(weights)
    classes = CLASSES + _looks(appearance, detector.net.classes)
    own = rubrics if rubrics is not None else [None] * len(prompts)
    allowed = [permitted(sorted((rubric_of(prompt) if given is None else given).permits), classes)
               for prompt, given in zip(prompts, own, strict=True)]
    allowed_BK = torch.tensor([[name in some for name in classes] for some in allowed])
    outputs = [detector.net.classes.index(name) for name in classes]
    plain_BK, logits_BK, heat_BKhw, explained = _look(detector, features, images.tensor)
    plain_BK, logits_BK, heat_BKhw = plain_BK[:, outputs], logits_BK[:, outputs], heat_BKhw[:, outputs]
    values, unlisted = (log_p_clean(x, allowed_BK).exp().tolist() for x in (logits_BK, plain_BK))
    heat_Bhw = heat_BKhw.masked_fill(allowed_BK[..., None, None], -torch.inf).sigmoid().amax(dim=1).half().numpy()
    return [
        Verdict(value=value, details=ArtifactResult(
            probability=dict(zip(classes, row, strict=True)), permitted=some, heat_hw=heat,
            unlisted=None if features is None else without, explained=names))
        for value, without, row, some, heat, names in zip(
            values, unlisted, logits_BK.sigmoid().tolist(), allowed, heat_Bhw, explained, strict=True)
    ]  # fmt: skip


artifact.range = (0.0, 1.0)  # type: ignore[attr-defined]
artifact.floor = 0.02  # type: ignore[attr-defined]
# Summed as an objective it is hacked at once: an empty image has no defect. As a gate it only caps what is broken.
artifact.role = "gate"  # type: ignore[attr-defined]
artifact.cap = 0.3  # type: ignore[attr-defined]
artifact.below = 0.8  # type: ignore[attr-defined]


def _looks(wanted: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The classes of looks that shall count."""
    given = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for name in given:
        if name not in APPEARANCES:
            raise RlhfImgError(f'reward artifact: no look is called "{name}"; {did_you_mean(str(name), APPEARANCES)}')
        if name not in known:
            raise RlhfImgError(f"reward artifact: these weights know no looks, and so no {name}. Train others with: "
                               f"rlhf-img reward train artifact --images FOLDER --appearance")
    return given


@torch.inference_mode()
def _look(
    detector: Detector, features: str | None, images_B3HW: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[tuple[str, ...]]]:
    """Image logits without a feature list and with it, heat maps with it, and the features that it took away."""
    if features is None:
        logits_BK, heat_BKhw = detector(images_B3HW)
        return logits_BK, logits_BK, heat_BKhw, [()] * len(images_B3HW)
    allowed = _allow_list(features, detector)
    seen = [allowed(detector.net, part) for part in detector.parts(images_B3HW)]
    before = torch.cat([without for without, _, _ in seen]).float()
    after = torch.cat([listed for _, listed, _ in seen]).float()
    pool = detector.net.pool
    return pool(before).cpu(), pool(after).cpu(), after.cpu(), [one for _, _, names in seen for one in names]


@lru_cache(maxsize=4)
def _allow_list(file: str, detector: Detector) -> AllowList:
    return open_list(Path(file), detector.net)


@lru_cache(maxsize=4)
def _detector(weights: str | None) -> Detector:
    return load_detector(WEIGHTS if weights is None else Path(weights))
