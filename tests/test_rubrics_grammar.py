"""The grammar decomposer: prompts to requirements, and what it admits not to understand."""

import numpy as np
import pytest

from rlhf_img.playground.captions import caption
from rlhf_img.playground.scene import sample_scene
from rlhf_img.rubrics import decompose
from rlhf_img.rubrics.scoring import describe


def facts(prompt):
    return {describe(r) for r in decompose(prompt).rubric.requirements}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle", {"circle", "exactly 1 circle", "circle is red"}),
        ("a pair of tiny cyan plus signs", {"cross", "exactly 2 cross", "cross is cyan", "cross is small"}),
        ("an image of 3 boxes against a gray background", {"square", "exactly 3 square", "grey background"}),
        ("discs on brown", {"circle", "brown background"}),
        (
            "a big green star beneath a disc",
            {
                "star",
                "exactly 1 star",
                "star is green",
                "star is large",
                "circle",
                "exactly 1 circle",
                "star below circle",
            },
        ),
        ("a red star and a blue star", {"red star", "exactly 1 red star", "blue star", "exactly 1 blue star"}),
        (
            "a red star above a blue star",
            {"red star", "exactly 1 red star", "blue star", "exactly 1 blue star", "red star above blue star"},
        ),
        (
            "two small circles and a large circle",
            {"small circle", "exactly 2 small circle", "large circle", "exactly 1 large circle"},
        ),
        ("no people", {"no person"}),
        ("without cats or dogs", {"no cat", "no dog"}),
        ('the word "SUN"', {'text reads "SUN"'}),
        ("a bus, grainy film", {"bus", "exactly 1 bus", "film grain"}),
        ("glasses in soft focus", {"glass", "soft focus"}),
        ("a cat, no film grain", {"cat", "exactly 1 cat", "no film grain"}),
        ("a box, dark vignette corners", {"square", "exactly 1 square", "vignette"}),
        ("grey", set()),
    ],
)
def test_requirements(prompt, expected):
    assert facts(prompt) == expected


def test_the_example_of_the_format():
    prompt = 'Three red cats to the left of a neon sign reading "OPEN LATE", no people, 35mm film grain'
    result = decompose(prompt)
    assert result.uncovered == ()
    assert facts(prompt) == {
        "cat", "exactly 3 cat", "cat is red", "neon sign", "exactly 1 neon sign", "cat left of neon sign",
        'neon sign reads "OPEN LATE"', "no person", "film grain",
    }  # fmt: skip
    assert result.rubric.permits == {"grain", "noise"}
    needs = {r.id: r.needs for r in result.rubric.requirements}
    assert needs["cat_left_of_neon_sign"] == ("cat", "neon_sign") and needs["cat_count"] == ("cat",)


@pytest.mark.parametrize(
    ("prompt", "uncovered"),
    [
        ("a cat, quickly", ("quickly",)),
        ("grey", ("grey",)),
        ("a photo of", ()),
        ("", ()),
        ("quickly!", ("quickly",)),
    ],
)
def test_what_is_not_understood_is_said(prompt, uncovered):
    assert decompose(prompt).uncovered == uncovered


def test_negation_words_inside_quotes_are_text():
    assert facts('a sign reading "do not touch"') == {"sign", "exactly 1 sign", 'sign reads "do not touch"'}


def test_every_playground_caption_is_covered_and_complete():
    rng = np.random.default_rng(0)
    for split in ("train", "val", "heldout"):
        for _ in range(60):
            scene = sample_scene(rng, split)
            text = caption(scene, rng)
            result = decompose(text)
            assert result.uncovered == (), text
            rubric = result.rubric
            counts = sorted(r.equals for r in rubric.requirements if r.check == "count")
            kinds = [(t.color, t.shape) for t in scene.things]
            assert counts == sorted(kinds.count(k) for k in set(kinds)), text
            assert [r.equals for r in rubric.requirements if r.check == "text"] == [scene.word] * bool(scene.word)
            assert [r.relation for r in rubric.requirements if r.check == "relation"] == (
                [scene.relation] * bool(scene.relation)
            )
            assert [r.equals for r in rubric.requirements if r.check == "style"] == [scene.style] * bool(scene.style)
            colors = {(r.equals, r.target) for r in rubric.requirements if r.check == "color"}
            named = {tuple(r.target.split(" ")[-2:]) for r in rubric.requirements if r.target and " " in r.target}
            assert set(kinds) <= colors | named, text
