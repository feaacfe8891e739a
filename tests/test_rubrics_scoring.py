"""Vision, checks and scoring: agreement with the renderer's truth, softness, needs, aggregation, and hacks."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.captions import caption
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import COLORS, SHAPES, Scene, Thing, break_scene, sample_scene
from rlhf_img.rubrics import Aggregate, Requirement, RequirementResult, Rubric, analyze, decompose, score
from rlhf_img.rubrics.checks import CheckResult, text_similarity
from rlhf_img.rubrics.colors import color_score
from rlhf_img.rubrics.scoring import aggregate, apply_needs

CHECK_OF = {
    "color": "color", "shape": "object", "count": "count", "size": "size", "relation": "relation",
    "background": "background", "word": "text", "style": "style",
}  # fmt: skip


def thing(shape="circle", color="red", x=32.0, y=32.0, radius=9.0, size="medium"):
    return Thing(shape=shape, color=color, size=size, x=x, y=y, radius=radius)


def picture(*things, **scene):
    return render(Scene(things=things, background=scene.pop("background", "grey"), **scene))


def says(prompt, image):
    return {r.text: r.score for r in score(decompose(prompt).rubric, image).requirements}


def breakable(scene, way, rubric):
    """Whether the rubric speaks of what was broken: the first thing's own size, or any requirement of that kind."""
    first = scene.things[0]
    targets = {r.target for r in rubric.requirements if r.check == CHECK_OF[way] and r.target}
    if way in ("size", "color"):
        return bool(targets & {first.shape, f"{first.color} {first.shape}"})
    return any(r.check == CHECK_OF[way] for r in rubric.requirements)


@pytest.mark.parametrize("split", ["train", "val", "heldout"])
def test_checks_agree_with_the_renderer(split):
    rng = np.random.default_rng(5)
    right, refused = [], []
    for seed in range(40):
        scene = sample_scene(rng, split)
        rubric = decompose(caption(scene, rng)).rubric
        right.append(score(rubric, render(scene, seed)).passed)
        broken, way = break_scene(scene, rng)
        if breakable(scene, way, rubric):
            refused.append(not score(rubric, render(broken, seed)).passed)
    assert np.mean(right) >= 0.975 and np.mean(refused) >= 0.975


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.0, 0.8, 1.6])
def test_shapes_are_known_through_blur_and_slight_noise(shape, sigma):
    rng = np.random.default_rng(0)
    image = picture(thing(shape=shape, radius=8.0)).astype(np.float32)
    if sigma:
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    (found,) = analyze(image).things
    assert found.shapes[shape] >= 0.5 and sum(v >= 0.5 for v in found.shapes.values()) == 1
    assert found.x * 64 == pytest.approx(32, abs=0.5) and found.radius * 64 == pytest.approx(8, abs=0.6)


@pytest.mark.parametrize("color", COLORS)
def test_every_color_is_named_even_when_it_is_a_bit_off(color):
    rgb = np.array(COLORS[color], float)
    for shift in (-14, 0, 10):
        assert color_score(np.clip(rgb + shift, 0, 255), color) > 0.5
        assert all(color_score(np.clip(rgb + shift, 0, 255), c) < 0.5 for c in COLORS if c != color)


def test_color_score_is_one_at_the_color_and_falls_towards_another():
    red, blue = np.array(COLORS["red"], float), np.array(COLORS["blue"], float)
    mixed = [color_score(red + t * (blue - red), "red") for t in (0, 0.1, 0.2, 0.3)]
    assert mixed[0] > 0.97 and mixed == sorted(mixed, reverse=True)


def test_a_malformed_shape_fails_softly():
    """Cutting more and more from a circle lowers its score, and half of it is no circle."""
    scores = []
    for cut in (0, 3, 5, 9):
        image = picture(thing(radius=10.0)).copy()
        image[22 : 22 + cut] = image[0, 0]
        scores.append(says("a circle", image)["circle"])
    assert scores[0] == 1 and scores[-1] < 0.5 and scores == sorted(scores, reverse=True)


def test_counts_are_soft_below_the_border():
    one, two, three = (picture(*(thing(x=x, radius=6.0) for x in xs)) for xs in ((12,), (12, 32), (12, 32, 52)))
    got = [says("three circles", image)["exactly 3 circle"] for image in (one, two, three)]
    assert got[0] < got[1] < 0.5 < got[2]
    assert says("two circles", three)["exactly 2 circle"] < 0.5


def test_bindings_are_not_swapped():
    image = picture(thing("circle", "blue", x=16), thing("square", "red", x=48))
    result = says("a red circle and a blue square", image)
    assert result["circle is red"] < 0.5 and result["square is blue"] < 0.5 and result["circle"] == 1
    stars = picture(thing("star", "red", x=16), thing("star", "blue", x=48))
    assert min(says("a red star left of a blue star", stars).values()) >= 0.5
    assert says("a red star right of a blue star", stars)["red star right of blue star"] < 0.5


def test_relation_turns_gradually():
    scores = []
    for angle in (0, 30, 60, 90, 180):
        x, y = 32 + 20 * np.cos(np.radians(angle)), 32 + 20 * np.sin(np.radians(angle))
        image = picture(thing("circle", "red", radius=7), thing("square", "blue", x=x, y=y, radius=7))
        scores.append(says("a circle left of a square", image)["circle left of square"])
    assert scores[1] > 0.5 > scores[2] and scores == sorted(scores, reverse=True)


def test_letters_are_no_objects_and_are_read():
    image = picture(thing("square", "pink", y=46), word="LOVE", word_at_top=True, background="brown")
    result = score(decompose('a pink square and the word "LOVE" on brown').rubric, image)
    assert result.passed and len(analyze(image).things) == 1
    assert says('a pink square and the word "MOON"', image)['text reads "MOON"'] < 0.5
    assert says('the word "GO"', picture(thing()))['text reads "GO"'] == 0


def test_text_hacks_do_not_pay():
    assert text_similarity("OPEN", "open") == 1
    for spam in ("OPEN OPEN OPEN", "xxOPENxxxxxxx", "OPEN but also other words"):
        assert text_similarity("OPEN", spam) < 0.5
    assert text_similarity("OPEN", "OPAN") == 0.75 and text_similarity("OPEN", "") == 0
    assert text_similarity("OPEN", "we are open late", extra_text="ignore") == 1


def test_styles_are_seen_only_where_they_are():
    for style in ("film grain", "soft focus", "vignette"):
        image = picture(thing("square", "blue"), style=style)
        for other in ("film grain", "soft focus", "vignette"):
            (value,) = [v for k, v in says(f"a square, {other}", image).items() if k == other]
            assert (value >= 0.5) == (style == other), (style, other, value)


def test_unknown_is_unscored_and_never_zero():
    result = score(decompose("a cat").rubric, picture(thing()))
    assert result.total is None and result.passed is None
    assert all(r.score is None and "does not know" in r.evidence for r in result.requirements)
    vqa = Rubric(prompt="p", requirements=(Requirement(id="q", check="vqa", ask="Is it night?"),))
    assert score(vqa, picture(thing())).total is None
    judged = score(vqa, picture(thing()), {"vqa": lambda r, a: CheckResult(score=0.8, evidence="judge")})
    assert judged.total == pytest.approx(0.8) and judged.passed


def test_absent():
    image = picture(thing())
    assert says("no squares", image)["no square"] >= 0.5
    assert says("no circles", image)["no circle"] < 0.5
    assert says("no red circles", image)["no red circle"] < 0.5 <= says("no blue circles", image)["no blue circle"]


def test_an_empty_image_scores_zero_and_not_none():
    result = score(decompose("a red circle").rubric, np.full((64, 64, 3), 128, np.uint8))
    assert result.passed is False and result.total < 0.2


@pytest.mark.parametrize("xs", [(22.0, 38.6), (38.6, 22.0)])
def test_squares_that_touch_at_a_corner_are_two(xs):
    image = picture(*(thing("square", x=x, y=y, radius=10.0) for x, y in zip(xs, (22.0, 38.0), strict=True)))
    assert score(decompose("two red squares").rubric, image).passed


@pytest.mark.parametrize("radius", [6.5, 9.5])
def test_a_vignette_is_seen_behind_many_things(radius):
    spots = [(27, 14), (40, 47), (50, 25), (15, 43)]
    image = picture(
        *(thing(color="cyan", x=x, y=y, radius=radius) for x, y in spots), background="white", style="vignette"
    )
    assert score(decompose("four cyan circles on white, with a vignette").rubric, image).passed


def test_needs_cap_transitively_and_pass_through_the_unscored():
    needs = {"a": (), "b": ("a",), "c": ("b",), "d": ("u",), "u": ("a",)}
    final = apply_needs(needs, {"a": 0.3, "b": 0.9, "c": 0.8, "d": 1.0, "u": None})
    assert final == {"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.3, "u": None}
    reversed_order = dict(reversed(needs.items()))
    assert apply_needs(reversed_order, {"a": 0.3, "b": 0.9, "c": 0.8, "d": 1.0, "u": None}) == final


def results(*pairs):
    return [
        RequirementResult(id=str(i), check="vqa", text="", score=s, passed=None if s is None else s >= 0.5, weight=w,
                          evidence="")
        for i, (s, w) in enumerate(pairs)
    ]  # fmt: skip


def test_aggregation_by_hand():
    pairs = results((1.0, 1), (0.25, 3))
    assert aggregate(pairs, Aggregate()) == pytest.approx(1.75 / 4)
    assert aggregate(pairs, Aggregate(method="geometric")) == pytest.approx(0.25**0.75)
    assert aggregate(pairs, Aggregate(method="all")) == 0 and aggregate(results((0.5, 1)), Aggregate(method="all")) == 1
    assert aggregate(results((0.0, 1), (1.0, 9)), Aggregate(), frozenset({"0"})) == 0.5
    assert aggregate(results((1.0, 1), (1.0, 9)), Aggregate(), frozenset({"0"})) == 1


def test_unscored_is_dropped_until_too_little_is_left():
    assert aggregate(results((1.0, 7), (None, 3)), Aggregate()) == 1
    assert aggregate(results((1.0, 6), (None, 4)), Aggregate()) is None
    assert aggregate(results((None, 1)), Aggregate(min_scored=0)) is None and aggregate([], Aggregate()) is None


def test_larger_images_score_the_same():
    scene = Scene(things=(thing("star", "green", x=20, radius=8), thing("cross", "pink", x=46)), background="white")
    small = render(scene)
    large = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC))
    rubric = decompose("a green star left of a pink cross on white").rubric
    assert score(rubric, small).passed and score(rubric, large).passed


@pytest.mark.parametrize("image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((4, 4, 3), np.uint8)])
def test_wrong_images_are_refused(image):
    with pytest.raises(RlhfImgError, match="expected uint8"):
        score(decompose("a circle").rubric, image)


def test_custom_check_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from rlhf_img.rubrics import CheckResult\n"
        "def bright(requirement, analysis):\n"
        "    return CheckResult(score=float(analysis.image.mean() / 255), evidence='mean')\n"
        "def bad(requirement, analysis):\n    return CheckResult(score=2.0, evidence='')\n",
        encoding="utf-8",
    )
    white = np.full((64, 64, 3), 255, np.uint8)

    def run(name):
        return score(Rubric(prompt="p", requirements=(Requirement(id="a", check=f"{path}:{name}"),)), white)

    assert run("bright").total == 1
    with pytest.raises(RlhfImgError, match="2.0"):
        run("bad")
    with pytest.raises(RlhfImgError, match="cannot be loaded"):
        run("absent")


def test_scoring_does_not_depend_on_the_order_of_requirements():
    scene = Scene(things=(thing("star", "green", x=20), replace(thing("cross", "pink"), x=46)), background="white")
    rubric = decompose("a green star left of a pink cross on white").rubric
    turned = rubric.model_copy(update={"requirements": tuple(reversed(rubric.requirements))})
    assert score(rubric, render(scene)).total == pytest.approx(score(turned, render(scene)).total)
