"""Text on the thing that bears it: a detector finds the sign, and only what is written there is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from rlhf_img.rubrics.checks import CheckResult, text_result
from rlhf_img.rubrics.detector import Detector, things_of
from rlhf_img.rubrics.ocr import read_lines
from rlhf_img.rubrics.schema import Requirement, Rubric
from rlhf_img.rubrics.vision import LARGE, Box

_LEAST = 16
"""Pixels of a side below which nothing can be read."""


def read_on_targets(
    detector: Detector, rubrics: Sequence[Rubric], images: Sequence[npt.NDArray[Any]]
) -> Mapping[tuple[int, str], CheckResult]:
    """The result of each text requirement whose target the detector finds, by image and id; of several the best.

    There is none where it finds no target, and none of images as small as the playground's.
    """
    asked = [
        (place, requirement)
        for place, rubric in enumerate(rubrics)
        for requirement in rubric.requirements
        if requirement.check == "text" and requirement.target and requirement.via in (None, "ocr")
        and max(images[place].shape[:2]) > LARGE
    ]  # fmt: skip
    if not asked:
        return {}
    seen = detector.detect([images[place] for place, _ in asked], [[str(r.target)] for _, r in asked])
    found: dict[tuple[int, str], CheckResult] = {}
    for (place, requirement), nouns in zip(asked, seen, strict=True):
        boxes = [t.box for t in things_of(nouns.get(str(requirement.target), ()), detector.config) if t.score >= 0.5]
        results = [r for box in boxes if (r := _read_in(requirement, images[place], box)) is not None]
        if results:
            found[place, requirement.id] = max(results, key=lambda result: result.score or 0.0)
    return found


def _read_in(requirement: Requirement, image: npt.NDArray[Any], box: Box) -> CheckResult | None:
    """The result of what is written in a part of the image; None if the part is too small."""
    height, width = image.shape[:2]
    left, top, right, bottom = (round(side * of) for side, of in zip(box, (width, height) * 2, strict=True))
    if min(right - left, bottom - top) < _LEAST:
        return None
    lines = read_lines(image[top:bottom, left:right])
    read = " ".join(line.text for line in lines)
    result = text_result(requirement, read, min((line.confidence for line in lines), default=1.0), (box,))
    return CheckResult(score=result.score, evidence=f"{result.evidence} on the {requirement.target}", boxes=(box,))
