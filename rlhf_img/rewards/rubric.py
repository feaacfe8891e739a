"""The rubric reward: how much of what a prompt asks for is in the image."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlhf_img import rubrics as rubric_room
from rlhf_img.config import from_mapping
from rlhf_img.errors import RlhfImgError, did_you_mean
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
    via: str | None = None,
    worst: float = 0.5,
    **columns: object,
) -> list[Verdict]:
    """How much of each image's rubric is met, in [0, 1]; the `RubricResult` with every requirement is in the details.

    rubrics: the rubric of each image's prompt where the data set has one; other prompts are decomposed (and kept).
    judge: settings of a judge model (the fields of `JudgeConfig`), which is asked what the checks cannot tell.
    detector: settings of an object detector (the fields of `DetectorConfig`), which is asked before the judge.
    worst: share, in [0, 1], of the lowest requirement's score in the value; the rest is the total. A thing that is
    missing fails all that is said of it, a wrong number only one line: the total alone may pay for drawing too much.
    via: who alone scores the requirements that do not say so themselves: "vlm" the judge, "detector", or "cv".
    Unscored where too much of a rubric could not be checked, or where nothing could be turned into a requirement.
    """
    if not 0 <= worst <= 1:
        raise RlhfImgError(f"reward rubric: `worst` is a share between 0 and 1; got {worst}")
    given = rubrics if rubrics is not None else [None] * len(prompts)
    own = [rubric_of(prompt) if one is None else one for prompt, one in zip(prompts, given, strict=True)]
    if via is not None:
        _require(via, judge, detector)
        own = [_scored_by(one, via) for one in own]
    asked = None if judge is None else open_judge(from_mapping(JudgeConfig, judge, "judge"))
    finder = None if detector is None else open_detector(from_mapping(DetectorConfig, detector, "detector"))
    return [_verdict(result, worst) for result in rubric_room.score_all(own, list(images.arrays), asked, finder)]


rubric.range = (0.0, 1.0)  # type: ignore[attr-defined]
rubric.floor = 0.02  # type: ignore[attr-defined]


@lru_cache(maxsize=65_536)
def rubric_of(prompt: str) -> Rubric:
    """The rubric that the grammar makes of a prompt. Raises what `rubrics.decompose` raises."""
    return rubric_room.decompose(prompt).rubric


def _require(via: str, judge: object, detector: object) -> None:
    models = {"vlm": judge, "detector": detector}
    if via not in (ways := ("cv", *models)):
        raise RlhfImgError(f'reward rubric: `via` is one of {", ".join(ways)}; {did_you_mean(via, ways)}')
    if via in models and models[via] is None:
        raise RlhfImgError(f"reward rubric: `via: {via}` needs the option `{'judge' if via == 'vlm' else via}`")


def _scored_by(one: Rubric, via: str) -> Rubric:
    requirements = tuple(r if r.via else r.model_copy(update={"via": via}) for r in one.requirements)
    return one.model_copy(update={"requirements": requirements})


def _verdict(result: RubricResult, worst: float) -> Verdict:
    if result.total is not None:
        lowest = min(r.score for r in result.requirements if r.score is not None)
        return Verdict(value=(1 - worst) * result.total + worst * lowest, details=result)
    reason = "too little of the rubric could be checked" if result.requirements else "the rubric has no requirement"
    return Verdict(value=None, reason=reason, details=result)
