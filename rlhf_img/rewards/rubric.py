"""The rubric reward: how much of what a prompt asks for is in the image."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlhf_img import rubrics as rubric_room
from rlhf_img.config import from_mapping
from rlhf_img.judges import JudgeConfig, open_judge
from rlhf_img.rewards.protocol import Images, Verdict
from rlhf_img.rubrics import DetectorConfig, Rubric, RubricResult, open_detector


def rubric(
    prompts: Sequence[str],
    images: Images,
    *,
    rubrics: Sequence[Rubric | None] | None = None,
    judge: Mapping[str, Any] | None = None,
    detector: Mapping[str, Any] | None = None,
    **columns: object,
) -> list[Verdict]:
    """The total of each image's rubric, in [0, 1]; the `RubricResult` with every requirement is in the details.

    rubrics: the rubric of each image's prompt where the data set has one; other prompts are decomposed (and kept).
    judge: settings of a judge model (the fields of `JudgeConfig`), which is asked what the checks cannot tell.
    detector: settings of an object detector (the fields of `DetectorConfig`), which is asked before the judge.
    Unscored where too much of a rubric could not be checked, or where nothing could be turned into a requirement.
    """
    given = rubrics if rubrics is not None else [None] * len(prompts)
    own = [rubric_of(prompt) if one is None else one for prompt, one in zip(prompts, given, strict=True)]
    asked = None if judge is None else open_judge(from_mapping(JudgeConfig, judge, "judge"))
    finder = None if detector is None else open_detector(from_mapping(DetectorConfig, detector, "detector"))
    return [_verdict(result) for result in rubric_room.score_all(own, list(images.arrays), asked, finder)]


rubric.range = (0.0, 1.0)  # type: ignore[attr-defined]
rubric.floor = 0.02  # type: ignore[attr-defined]


@lru_cache(maxsize=65_536)
def rubric_of(prompt: str) -> Rubric:
    """The rubric that the grammar makes of a prompt. Raises what `rubrics.decompose` raises."""
    return rubric_room.decompose(prompt).rubric


def _verdict(result: RubricResult) -> Verdict:
    if result.total is not None:
        return Verdict(value=result.total, details=result)
    reason = "too little of the rubric could be checked" if result.requirements else "the rubric has no requirement"
    return Verdict(value=None, reason=reason, details=result)
