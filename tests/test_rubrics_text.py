"""Text in pictures larger than the playground's: read anywhere, or only on the thing that the detector finds."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rlhf_img.rubrics import Requirement, Rubric, score, score_all
from rlhf_img.rubrics.detector import Detection, DetectorConfig

SIGN = (0.2, 0.15, 0.85, 0.45)


def poster(*lines):
    """384 px, textured; a sign with lines on it, and another word below the sign."""
    rng = np.random.default_rng(0)
    image = Image.fromarray((110 + 25 * rng.random((384, 384, 3))).astype(np.uint8))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=36)
    draw.rectangle([384 * side for side in SIGN], fill=(250, 240, 220))
    for row, line in enumerate(lines):
        draw.text((90, 64 + 48 * row), line, fill=(20, 20, 20), font=font)
    draw.text((60, 300), "elsewhere", fill=(255, 255, 255), font=font)
    return np.asarray(image)


class SignDetector:
    config = DetectorConfig(model="signs")

    def detect(self, images, nouns):
        box = Detection(score=0.9, box=SIGN)
        return [{noun: [box] if noun == "sign" else [] for noun in words} for words in nouns]


def rubric(**more):
    text = Requirement.model_validate({"id": "words", "check": "text", "equals": "OPEN LATE"} | more)
    return Rubric(prompt="p", requirements=(text,))


def test_text_is_read_anywhere_in_a_large_image_and_other_text_costs():
    (strict,) = score(rubric(), poster("OPEN", "LATE")).requirements
    assert strict.evidence == "reads 'OPEN LATE elsewhere'" and strict.score < 0.5 and len(strict.boxes) == 3
    (lenient,) = score(rubric(extra_text="ignore"), poster("OPEN", "LATE")).requirements
    assert lenient.score > 0.9
    left, top, right, bottom = strict.boxes[0]
    assert SIGN[0] < left < right < SIGN[2] and SIGN[1] - 0.02 < top < bottom < SIGN[3]


def test_on_its_target_nothing_but_what_is_written_there_counts():
    image = poster("OPEN", "LATE")
    found = score_all([rubric(target="sign"), rubric(target="door")], [image, image], detector=SignDetector())
    (on_sign,), (on_door,) = (result.requirements for result in found)
    assert on_sign.score > 0.9 and on_sign.evidence == "reads 'OPEN LATE' on the sign" and on_sign.boxes == (SIGN,)
    assert on_door.score < 0.5 and "elsewhere" in on_door.evidence  # no door is found: the whole image is read
    (alone,) = score_all([rubric(target="sign", via="ocr")], [image])[0].requirements
    assert alone.score < 0.5


@pytest.mark.parametrize(
    "hack", [("OPEN LATE", "OPEN LATE"), ("xxOPEN LATE", "qqqqqqqqqqqq"), ("OPEN LATE", "buried in words")]
)
def test_repeating_or_burying_the_words_on_the_sign_does_not_pay(hack):
    (result,) = score_all([rubric(target="sign")], [poster(*hack)], detector=SignDetector())[0].requirements
    assert result.score < 0.5
