"""The embedded world and its model: exact truth, a split by composition, stock files, and training that resumes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Krea2Pipeline

from rlhf_img.model.loading import load
from rlhf_img.playground import build
from rlhf_img.playground.captions import caption
from rlhf_img.playground.data import FACT_SIZES, example, facts, prompts
from rlhf_img.playground.fit import FitConfig, fit
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZE,
    SPLITS,
    Scene,
    Thing,
    break_scene,
    holds,
    pairs_of,
    sample_scene,
    split_of,
    splits_of,
)
from rlhf_img.rubrics import decompose

WEIGHTS = Path(__file__).parents[1] / "rlhf_img" / "playground" / "weights"


def test_an_example_is_the_same_everywhere_and_differs_by_seed() -> None:
    assert np.array_equal(example(5).image, example(5).image) and example(5).caption == example(5).caption
    assert example(5).scene != example(6).scene


def test_a_pixel_inside_a_thing_has_its_color_and_the_rest_the_background() -> None:
    thing = Thing(shape="square", color="blue", size="large", x=40.0, y=20.0, radius=12.0)
    image = render(Scene(things=(thing,), background="brown"))
    assert tuple(image[20, 40]) == COLORS["blue"]
    assert tuple(image[50, 10]) == BACKGROUNDS["brown"]
    whole = (image == COLORS["blue"]).all(2).sum()  # pixels of the edge are neither colour
    assert (2 * 12.0 * 0.88 - 2) ** 2 <= whole <= (2 * 12.0 * 0.88) ** 2


def test_things_stay_inside_and_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        for i, a in enumerate(scene.things):
            assert a.radius <= min(a.x, a.y) and max(a.x, a.y) <= SIZE - a.radius
            for b in scene.things[i + 1 :]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        if scene.relation:
            assert holds(scene.relation, scene.things[0], scene.things[1])


def test_relations_exclude_one_another() -> None:
    a, b = (Thing(shape="star", color="red", size="small", x=x, y=30.0, radius=8.0) for x in (15.0, 45.0))
    assert [r for r in RELATIONS if holds(r, a, b)] == ["left of"]
    assert [r for r in RELATIONS if holds(r, b, a)] == ["right of"]


def test_splits_share_no_combination_and_training_sees_every_color_shape_and_background() -> None:
    rng = np.random.default_rng(1)
    unseen = {pair for pair in pairs_of("val", "grey")}
    assert len(unseen) == 4 and all(set(pairs_of("val", b)) == unseen for b in BACKGROUNDS)
    for background in BACKGROUNDS:
        known = pairs_of("train", background)
        assert {c for c, _ in known} == set(COLORS) and {s for _, s in known} == set(SHAPES)
        assert len(pairs_of("heldout", background)) == 8
    for split in SPLITS:
        for _ in range(200):
            scene = sample_scene(rng, split)
            first = scene.things[0]
            assert split_of(first.color, first.shape, scene.background) == split
            assert splits_of(scene) <= {"train", split}


def test_held_out_prompts_always_name_the_background_and_training_captions_no_unseen_combination() -> None:
    for i in range(300):
        heldout = example(i, "heldout")
        assert heldout.scene.background in heldout.caption.replace("gray", "grey")
        told = decompose(example(i, "train", wrong_captions=1.0).caption).rubric.requirements
        colors = {r.target: r.equals for r in told if r.check == "color"}
        assert not {(c, s) for s, c in colors.items()} & set(pairs_of("val", "grey"))


def test_captions_vary_and_name_every_thing() -> None:
    rng = np.random.default_rng(2)
    scene = Scene(
        things=tuple(
            Thing(shape="circle", color="red", size="large", x=x, y=30.0, radius=12.5) for x in (15.0, 48.0)
        ),
        background="grey",
    )
    said = {caption(scene, rng) for _ in range(200)}
    assert len(said) > 20
    assert all("red" in text and ("circles" in text or "discs" in text) for text in said)
    assert all("two" in t or "2" in t or "a pair of" in t for t in said)


def test_facts_name_each_kind_of_thing_in_order_and_what_is_not_there() -> None:
    star = Thing(shape="star", color="pink", size="small", x=15.0, y=30.0, radius=8.0)
    other = replace(star, shape="circle", color="red", x=45.0)
    none_of_four = [8, 5, 3, 4]
    assert facts(Scene(things=(star, star), background="grey")) == [7, 3, 0, 1, *none_of_four, 4, 1, 12, 3]
    pair = Scene(things=(star, other), background="white", relation="left of", word="HI", style="vignette")
    assert facts(pair) == [7, 3, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]
    rng = np.random.default_rng(4)
    for _ in range(300):
        assert all(0 <= f < n for f, n in zip(facts(sample_scene(rng)), FACT_SIZES, strict=True))


def test_a_broken_scene_differs_in_the_fact_that_it_names() -> None:
    rng = np.random.default_rng(3)
    ways = set()
    for _ in range(400):
        scene = sample_scene(rng)
        broken, way = break_scene(scene, rng)
        ways.add(way)
        assert broken != scene
        if way == "count":
            assert len(broken.things) != len(scene.things)
        elif way in ("color", "shape", "size"):
            assert {getattr(t, way) for t in broken.things} != {getattr(t, way) for t in scene.things}
        elif way in ("background", "word", "style"):
            assert getattr(broken, way) != getattr(scene, way)
    assert ways == {"color", "shape", "count", "background", "size", "relation", "word", "style"}


def test_prompts_are_distinct_and_those_of_splits_do_not_overlap() -> None:
    train, heldout = prompts("train", 200), prompts("heldout", 100)
    assert len(set(train)) == 200 and len(set(heldout)) == 100 and not set(train) & set(heldout)


def test_the_tokenizer_has_the_layout_of_the_stock_pipeline() -> None:
    tokenizer = build.build_tokenizer(prompts("train", 100))
    assert len(tokenizer(build.PREFIX).input_ids) == 34 and len(tokenizer(build.SUFFIX).input_ids) == 5
    strange = "a façade of 3 zebras"
    ids = tokenizer(strange).input_ids
    assert tokenizer.decode(ids) == strange  # bytes, where no caption has the word


def test_the_shipped_model_is_small_stock_and_says_where_it_comes_from() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) <= 16e6
    assert "playground pretrain" in (WEIGHTS / "README.md").read_text()
    pipe = Krea2Pipeline.from_pretrained(str(WEIGHTS), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle on white", height=64, width=64, num_inference_steps=4, guidance_scale=0.0,
                 generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip
    assert np.asarray(image).std() > 5
    assert load("playground").default_size == 64


def test_training_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = FitConfig(steps=6, lr=1e-2, ema=0.9, save_every=3)

    def train(folder: Path, stop_at: int | None = None) -> torch.nn.Module:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def loss_fn(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        fit("linear", module, loss_fn, config, folder)
        return module

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=4)
    resumed = train(tmp_path / "cut")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
