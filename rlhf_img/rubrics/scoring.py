"""From a rubric and an image to one total, with the score and the evidence of every requirement."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import Judge
from rlhf_img.rubrics.checks import Check, CheckResult, find_check
from rlhf_img.rubrics.detector import Detector, ask_detector
from rlhf_img.rubrics.questions import ask_judge
from rlhf_img.rubrics.regions import read_on_targets
from rlhf_img.rubrics.schema import Aggregate, Requirement, Rubric
from rlhf_img.rubrics.vision import Analysis, Box, analyze

_MODELS = {"vlm": "a judge", "detector": "a detector"}
"""Values of `via` for which a model scores in place of the check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequirementResult:
    """One requirement's outcome. `score` in [0, 1] is after `needs`; None where the check could not tell."""

    id: str
    check: str
    text: str
    score: float | None
    passed: bool | None
    weight: float
    evidence: str
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RubricResult:
    """`total` in [0, 1] and `passed` (every scored requirement passes); both None if too little could be scored."""

    total: float | None
    passed: bool | None
    requirements: tuple[RequirementResult, ...]


def score(rubric: Rubric, image: npt.NDArray[Any], checks: Mapping[str, Check] | None = None) -> RubricResult:
    """Score an image against its rubric.

    Args:
        image: uint8 (H, W, 3), RGB.
        checks: replaces checks by name.

    Raises RlhfImgError if the image has another form or a check cannot be loaded or misbehaves.
    """
    return _result(rubric, _run_checks(rubric, image, checks or {}))


def score_all(
    rubrics: Sequence[Rubric],
    images: Sequence[npt.NDArray[Any]],
    judge: Judge | None = None,
    detector: Detector | None = None,
) -> list[RubricResult]:
    """As `score`, of each image with its rubric. What the checks leave unscored, the detector is asked, all at once;
    then the judge, what the detector leaves. `via` says if one of them alone is to score. Text on a target that the
    detector finds is read there alone.
    """
    raw = [_run_checks(rubric, image, {}) for rubric, image in zip(rubrics, images, strict=True)]
    if detector is not None:
        for (place, name), result in read_on_targets(detector, rubrics, images).items():
            raw[place][name] = result
        _fill(raw, rubrics, "detector", partial(ask_detector, detector, images))
    if judge is not None:
        _fill(raw, rubrics, "vlm", partial(ask_judge, judge, images))
    return [_result(rubric, checked) for rubric, checked in zip(rubrics, raw, strict=True)]


def _fill(
    raw: Sequence[dict[str, CheckResult]],
    rubrics: Sequence[Rubric],
    via: str,
    ask: Callable[[Sequence[tuple[int, Requirement]]], list[CheckResult]],
) -> None:
    """Put the answers of `ask` where there is no score yet and `via` lets it answer."""
    left = [
        (place, requirement)
        for place, rubric in enumerate(rubrics)
        for requirement in rubric.requirements
        if raw[place][requirement.id].score is None and requirement.via in (None, via)
    ]
    for (place, requirement), answer in zip(left, ask(left), strict=True):
        raw[place][requirement.id] = answer


def _run_checks(rubric: Rubric, image: npt.NDArray[Any], checks: Mapping[str, Check]) -> dict[str, CheckResult]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 16:
        raise RlhfImgError(
            f"the image is {image.dtype} {image.shape}; expected uint8 (H, W, 3), RGB, at least 16 px a side"
        )
    analysis = analyze(image)
    return {r.id: _run(r, analysis, checks) for r in rubric.requirements}


def _result(rubric: Rubric, raw: Mapping[str, CheckResult]) -> RubricResult:
    final = apply_needs({r.id: r.needs for r in rubric.requirements}, {i: c.score for i, c in raw.items()})
    results = tuple(
        RequirementResult(
            id=r.id,
            check=r.check,
            text=describe(r),
            score=(value := final[r.id]),
            passed=None if value is None else value >= 0.5,
            weight=r.weight,
            evidence=raw[r.id].evidence,
            boxes=raw[r.id].boxes,
        )
        for r in rubric.requirements
    )
    musts = frozenset(r.id for r in rubric.requirements if r.must)
    total = aggregate(results, rubric.aggregate, musts)
    scored = [r.passed for r in results if r.passed is not None]
    return RubricResult(total=total, passed=None if total is None else all(scored), requirements=results)


def _run(requirement: Requirement, analysis: Analysis, checks: Mapping[str, Check]) -> CheckResult:
    if requirement.via in _MODELS:
        needed = _MODELS[requirement.via]
        return CheckResult(score=None, evidence=f"via: {requirement.via} needs {needed}; none was given")
    check = checks[requirement.check] if requirement.check in checks else find_check(requirement.check)
    result = check(requirement, analysis)
    if not isinstance(result, CheckResult):
        raise RlhfImgError(f"check {requirement.check} returned {type(result).__name__}; expected a CheckResult")
    if result.score is not None and not 0 <= result.score <= 1:
        raise RlhfImgError(f"check {requirement.check} gave the score {result.score}; expected one in [0, 1] or None")
    return result


def apply_needs(needs: Mapping[str, Sequence[str]], scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Cap each score by those that it needs, and by what those need in turn.

    Capping keeps both softness and the verdict: a score stays at 0.5 or more if and only if all it rests on does.
    A parent that is unscored hands on only what caps it.
    """
    caps: dict[str, float] = {}

    def cap(name: str) -> float:
        """The least score among `name` and all that it rests on; 1 if none of them is scored."""
        if name not in caps:
            own = scores[name]
            caps[name] = min([1.0 if own is None else own, *(cap(parent) for parent in needs[name])])
        return caps[name]

    return {name: None if own is None else cap(name) for name, own in scores.items()}


def aggregate(
    results: Sequence[RequirementResult], how: Aggregate, musts: frozenset[str] = frozenset()
) -> float | None:
    """The total in [0, 1]; None if none is scored, or those scored have less than `min_scored` of the weight."""
    scored = [(r.score, r.weight) for r in results if r.score is not None]
    everything, weight = sum(r.weight for r in results), sum(w for _, w in scored)
    # the tolerance keeps 0.7 of 1.0 from failing a min_scored of 0.7 by rounding
    if not scored or weight + 1e-9 < how.min_scored * everything:
        return None
    match how.method:
        case "weighted_mean":
            total = sum(s * w for s, w in scored) / weight
        case "geometric":
            # the floor leaves the other requirements a say when one is at 0
            total = math.exp(sum(w * math.log(max(s, 1e-3)) for s, w in scored) / weight)
        case "all":
            total = float(all(s >= 0.5 for s, _ in scored))
    failed_must = any(r.id in musts and r.score is not None and r.score < 0.5 for r in results)
    return min(total, how.must_cap) if failed_must else total


def describe(requirement: Requirement) -> str:
    """A requirement in words: "exactly 3 cat", "cat left of neon sign"."""
    r = requirement
    no = "no " if r.expect == "absent" else ""
    match r.check:
        case "object":
            return f"{no}{r.target}"
        case "count":
            return f"exactly {r.equals} {r.target}"
        case "color" | "size":
            return f"{r.target} is {r.equals}"
        case "relation":
            return f"{r.subject} {r.relation} {r.object}"
        case "background":
            return f"{r.equals} background"
        case "style":
            return f"{no}{r.equals}"
        case "text":
            return f'{r.target or "text"} reads "{r.equals}"'
        case "vqa":
            return f"{r.ask} ({'no' if no else 'yes'})"
    return f"{r.check} {r.target or r.ask or r.equals or ''}".strip()
