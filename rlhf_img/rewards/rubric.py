"""The rubric reward: how much of what a prompt asks for is in the image."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rlhf_img import rubrics as rubric_room
from rlhf_img.rewards.protocol import Images, Verdict
from rlhf_img.rubrics.schema import Rubric


def rubric(
    prompts: Sequence[str], images: Images, *, rubrics: Sequence[Rubric | None] | None = None, **columns: object
) -> list[Verdict]:
    """The total of each image's rubric, in [0, 1]; the `RubricResult` with every requirement is in the details.

    rubrics: the rubric of each image's prompt where the data set has one; other prompts are decomposed (and kept).
    Unscored where too much of a rubric could not be checked, or where nothing could be turned into a requirement.
    """
    own = rubrics if rubrics is not None else [None] * len(prompts)
    return [
        _verdict(rubric_of(prompt) if given is None else given, image)
        for prompt, given, image in zip(prompts, own, images.arrays, strict=True)
    ]


rubric.range = (0.0, 1.0)  # type: ignore[attr-defined]
rubric.floor = 0.02  # type: ignore[attr-defined]


@lru_cache(maxsize=65_536)
def rubric_of(prompt: str) -> Rubric:
    """The rubric that the grammar makes of a prompt. Raises what `rubrics.decompose` raises."""
    return rubric_room.decompose(prompt).rubric


def _verdict(rubric: Rubric, image: np.ndarray) -> Verdict:
    result = rubric_room.score(rubric, image)
    if result.total is not None:
        return Verdict(value=result.total, details=result)
    reason = "too little of the rubric could be checked" if rubric.requirements else "the rubric has no requirement"
    return Verdict(value=None, reason=reason, details=result)
