"""The rubric reward: totals from the checks, the prompt's own rubric first, unscored where nothing can be said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_img import rubrics as rubric_room
from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import Scene, Thing
from rlhf_img.rewards.protocol import Images, Reward
from rlhf_img.rewards.rubric import rubric
from rlhf_img.rewards.scoring import score

RED = Thing(shape="circle", color="red", size="large", x=20, y=30, radius=12)
BLUE = Thing(shape="square", color="blue", size="medium", x=46, y=30, radius=9)


def images_of(*scenes: Scene) -> Images:
    return Images(torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255)


def test_the_image_that_shows_what_is_asked_for_scores_higher():
    images = images_of(Scene(things=(RED, BLUE), background="white"), Scene(things=(BLUE,), background="white"))
    scores = score([Reward(name="rubric", fn=rubric)], ["a red circle and a blue square"] * 2, images)
    whole, half = scores.values_BK[:, 0].tolist()
    assert whole > 0.9 and half < 0.7
    result = scores.details["rubric"][1]
    assert (result.total + min(r.score for r in result.requirements)) / 2 == half and not result.passed
    assert {r.passed for r in result.requirements} == {True, False}


def test_worst_says_how_much_the_lowest_requirement_counts():
    images = images_of(Scene(things=(RED, replace(RED, x=46)), background="white"))
    totals = {w: rubric(["a large red circle on white"], images, worst=w)[0] for w in (0.0, 0.25, 1.0)}
    lowest = min(r.score for r in totals[0.0].details.requirements)
    assert totals[0.0].value == totals[0.0].details.total > 0.6 > lowest == totals[1.0].value
    assert totals[0.25].value == pytest.approx(0.75 * totals[0.0].value + 0.25 * lowest)
    with pytest.raises(RlhfImgError, match="between 0 and 1; got 1.5"):
        rubric(["a red circle"], images, worst=1.5)


def test_a_rubric_in_the_column_goes_before_the_prompt():
    own = rubric_room.decompose("a blue square").rubric
    images = images_of(*[Scene(things=(BLUE,), background="white")] * 2)
    with_own, decomposed = rubric(["a red circle"] * 2, images, rubrics=[own, None])
    assert with_own.value > 0.9 > decomposed.value


def test_a_rubric_without_requirements_is_unscored_and_says_so():
    empty = rubric_room.Rubric(prompt="a mood")
    (verdict,) = rubric(["a mood"], images_of(Scene(things=(RED,), background="white")), rubrics=[empty])
    assert verdict.value is None and "no requirement" in verdict.reason


def test_via_hands_every_requirement_to_one_scorer():
    images = images_of(Scene(things=(RED,), background="white"), Scene(things=(BLUE,), background="white"))
    prompts = ["a red circle"] * 2
    right, wrong = rubric(prompts, images, via="vlm", judge={"model": "playground"})
    assert right.value > 0.8 and wrong.value < 0.2
    assert all("playground@" in r.evidence for verdict in (right, wrong) for r in verdict.details.requirements)
    checked = rubric(prompts, images, via="cv", judge={"model": "playground"})
    assert [v.value for v in checked] == [v.value for v in rubric(prompts, images)]


def test_via_without_the_model_it_names_is_an_error():
    images = images_of(Scene(things=(RED,), background="white"))
    with pytest.raises(RlhfImgError, match="via: vlm` needs the option `judge`"):
        rubric(["a red circle"], images, via="vlm")
    with pytest.raises(RlhfImgError, match='did you mean "vlm"'):
        rubric(["a red circle"], images, via="vml")
