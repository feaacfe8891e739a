"""The grammar decomposer: prompts to requirements, and what it admits not to understand."""

import numpy as np
import pytest

from rlhf_img.playground.captions import caption
from rlhf_img.playground.scene import sample_scene
from rlhf_img.rubrics import decompose
from rlhf_img.rubrics.lexicon import SHAPE_SYNONYMS
from rlhf_img.rubrics.scoring import describe


def facts(prompt):
    return {describe(r) for r in decompose(prompt).rubric.requirements}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle", {"circle", "exactly 1 circle", "circle is red"}),
        (
            "a pair of tiny cyan plus signs",
            {"plus sign", "exactly 2 plus sign", "plus sign is cyan", "plus sign is small"},
        ),
        ("an image of 3 boxes against a gray background", {"box", "exactly 3 box", "grey background"}),
        ("discs on brown", {"disc", "brown background"}),
        (
            "a big green star beneath a disc",
            {
                "star",
                "exactly 1 star",
                "star is green",
                "star is large",
                "disc",
                "exactly 1 disc",
                "star below disc",
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
        ("glasses in soft focus", {"glasses", "soft focus"}),
        ("a cat, no film grain", {"cat", "exactly 1 cat", "no film grain"}),
        ("a box, dark vignette corners", {"box", "exactly 1 box", "vignette"}),
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
            named = {tuple(r.target.split(" ", 1)) for r in rubric.requirements if r.target and " " in r.target}
            named |= {tuple(name.split(" ", 1)) for _, name in named if " " in name}  # "small red star"
            found = {(color, SHAPE_SYNONYMS.get(noun, noun)) for color, noun in colors | named}
            assert set(kinds) <= found, text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two cats and three dogs", {"cat", "exactly 2 cat", "dog", "exactly 3 dog"}),
        ("twenty-one geese", {"goose", "exactly 21 goose"}),
        ("half a dozen mice", {"mouse", "exactly 6 mouse"}),
        ("several children", {"child", "Are there several children? (yes)"}),
        (
            "a red car left of a blue bus",
            {"car", "exactly 1 car", "car is red", "bus", "exactly 1 bus", "bus is blue", "car left of bus"},
        ),
        ("a teddy bear", {"teddy bear", "exactly 1 teddy bear"}),
        ("three hot dogs", {"hot dog", "exactly 3 hot dog"}),
        ("a stop sign", {"stop sign", "exactly 1 stop sign"}),
        ("an orange orange", {"orange", "exactly 1 orange", "orange is orange"}),
        ("a dark green vase", {"vase", "exactly 1 vase", "vase is dark green"}),
        ("a giant snail", {"snail", "exactly 1 snail", "snail is large"}),
        ("the wooden table", {"table", "Is the table made of wood? (yes)"}),
        (
            "two wooden chairs and a metal chair",
            {"wooden chair", "exactly 2 wooden chair", "metal chair", "exactly 1 metal chair"},
        ),
        ("the red and white tent", {"tent", "Is the tent partly red? (yes)", "Is the tent partly white? (yes)"}),
        ("the sleek, modern lamp", {"lamp", "Is the lamp sleek? (yes)", "Is the lamp modern? (yes)"}),
        ("the sleeping fox", {"fox", "Is the fox sleeping? (yes)"}),
        ("the fox is sleeping", {"fox", "Is the fox sleeping? (yes)"}),
        ("the fox is not sleeping", {"fox", "Is the fox sleeping? (no)"}),
        ("the door is green and open", {"door", "door is green", "Is the door open? (yes)"}),
        ("foxes sleeping on hay", {"fox", "hay", "fox on hay", "Are the foxes sleeping? (yes)"}),
        ("the man rides the horse", {"man", "horse", "man riding horse"}),
        ("the girl holding the kite", {"girl", "kite", "girl holding kite"}),
        ("the hut surrounded by trees", {"hut", "tree", "hut surrounded by tree"}),
        ("the man in the hat riding the mule", {"man", "hat", "mule", "man in hat", "man riding mule"}),
        ("the dog beside the well", {"dog", "well", "dog next to well"}),
        ("in the barn, the hen", {"barn", "hen", "hen in barn"}),
        ("the shelf has jars", {"shelf", "jar", "shelf with jar"}),
        ("the cat's tail", {"cat", "tail", "tail of cat"}),
        ("the children's book", {"children's book"}),
        ("the owl on the left", {"owl", "Is the owl on the left? (yes)"}),
        ("In the background there is the tower", {"tower", "Is the tower in the background? (yes)"}),
        ("a bear. The bear is brown.", {"bear", "exactly 1 bear", "bear is brown"}),
        ("a hut at dusk", {"hut", "exactly 1 hut", "Is it dusk? (yes)"}),
        ("no cars, without any people", {"no car", "no person"}),
        ("the lake, no clouds or birds", {"lake", "no cloud", "no bird"}),
        ("the owl, soft lighting", {"owl", "Does the image have soft lighting? (yes)"}),
        ("the owl, highly detailed", {"owl", "Is the image highly detailed? (yes)"}),
        ("a watercolor of the lake", {"watercolor", "lake"}),
        ("the lake, in the style of Hokusai", {"hokusai", "lake"}),
    ],
)
def test_free_english(prompt, expected):
    assert facts(prompt) == expected
    assert decompose(prompt).uncovered == ()


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("a sign that says “Don't stop”", "sign", "Don't stop"),
        ("a t-shirt with 'Keep Calm' on it", "t-shirt", "Keep Calm"),
        ("a poster on a brick wall titled \"It's 5 o'clock\"", "poster", "It's 5 o'clock"),
        ("""a mug reading "she said 'hi' twice" """, "mug", "she said 'hi' twice"),
        ('an "OPEN" neon sign above the door', "neon sign", "OPEN"),
        ('the words "Fresh Bread" on a chalkboard', "chalkboard", "Fresh Bread"),
        ('the word "SUN" on grey', None, "SUN"),
        ("the dogs' bowls near the cats' beds", None, None),
        ("rock 'n' roll in the '90s at 5 o'clock", None, None),
    ],
)
def test_quoted_words_and_their_bearer(prompt, target, text):
    found = [(r.target, r.equals) for r in decompose(prompt).rubric.requirements if r.check == "text"]
    assert found == ([] if text is None else [(target, text)])


def test_questions_need_what_they_are_about_and_styles_permit():
    rubric = decompose("a watercolor of a fluffy dog, blurred background").rubric
    assert [r.permits for r in rubric.requirements if r.check == "style"] == [("watercolor", "blur")]
    assert next(r for r in rubric.requirements if r.ask == "Is the dog fluffy?").needs == ("dog",)
    assert next(r for r in rubric.requirements if r.ask == "Is the background blurred?").permits == ("blur",)


@pytest.mark.parametrize(
    "prompt",
    [
        "", " ", "'", '"', '""', 'a sign "" here', "“open", "'s", "n't", "a", "the", "no", "is is", "and and", "has",
        "🐱 a cat 🎉", "猫が走る", "un gato negro", "ﬁsh ½ cup ²³ cats", "a\x00b", "--ar 3:4", "-", "in the style of",
        "in the style of ,", "is not n't not", "a very", "a cat, " * 200, "'a " * 500, '"x" ' * 100, "a" * 5000,
        "a red and a blue " * 100,
    ],
)  # fmt: skip
def test_no_prompt_raises(prompt):
    decompose(prompt)


def test_signs_that_say_something_are_reported():
    assert decompose("a cat 🎉 - *").uncovered == ("🎉",)
