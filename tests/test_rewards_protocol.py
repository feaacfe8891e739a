"""Calling rewards: conversion, None, failures, async, groups."""

import asyncio
import math
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.rewards.protocol import Images, Reward, Verdict
from rlhf_img.rewards.scoring import Scoring, score


def make_images(n: int) -> Images:
    """n images; image i is grey i / 8."""
    return Images(torch.arange(n).div(8).reshape(n, 1, 1, 1).expand(n, 3, 4, 6))


def run(fn, n: int = 4, *, max_unscored: float = 1.0, columns=None, group_size=None, **settings):
    reward = Reward(name="neon", fn=fn, **settings)
    return score([reward], [f"p{i}" for i in range(n)], make_images(n), columns, group_size=group_size,
                 max_unscored=max_unscored)


def values_of(scores) -> list[float | None]:
    return [None if math.isnan(v) else v for v in scores.values_BK[:, 0].tolist()]


def test_images_round_to_8_bits_and_convert_once():
    images = Images(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 5))
    assert images.arrays.shape == (1, 2, 5, 3)
    assert images.arrays[0, 0, 0].tolist() == [0, 128, 255]
    assert images.arrays is images.arrays
    assert images[0] is images[-1] is next(iter(images))
    assert images[0].size == (5, 2) and images[0].getpixel((4, 1)) == (0, 128, 255)


def test_images_from_pil_and_back_are_the_same_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    images = Images.from_pil([Image.fromarray(p) for p in pixels])
    assert (images.arrays == pixels).all()
    assert (images[1:].arrays == pixels[1:]).all() and len(images[1:]) == 1


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 4, 4, 3), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "float"),
        (torch.full((1, 3, 4, 4), -1.0), r"in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), math.nan), "not finite"),
    ],
)
def test_images_of_another_kind_are_refused(tensor, message):
    with pytest.raises(RlhfImgError, match=message):
        Images(tensor)


def test_a_reward_gets_prompts_images_and_columns_by_name():
    seen = {}

    def neon(prompts, images, seed, **columns):
        seen.update(prompts=prompts, seed=seed, columns=columns, first=images[1].getpixel((0, 0)))
        return [0.25] * len(images)

    scores = run(neon, columns={"seed": [3, 1, 4, 1], "source": list("abcd")})
    assert scores.values_BK.tolist() == [[0.25]] * 4 and scores.values_BK.dtype == torch.float32
    assert seen == {"prompts": ["p0", "p1", "p2", "p3"], "seed": [3, 1, 4, 1], "columns": {"source": list("abcd")},
                    "first": (32, 32, 32)}


def test_none_and_values_that_mean_nothing_are_unscored_and_never_zero():
    def neon(prompts, images, **columns):
        return [0.5, None, math.nan, math.inf, 1.5, 0.0, Verdict(value=None, reason="judge timed out"), np.float32(1.0)]

    scores = run(neon, 8)
    assert values_of(scores) == [0.5, None, None, None, None, 0.0, None, 1.0]
    assert scores.unscored == {"neon": {"no score given": 1, "not a finite number: nan": 1,
                                        "not a finite number: inf": 1, "out of its declared range [0, 1]": 1,
                                        "judge timed out": 1}}


def test_details_are_kept_beside_the_values():
    scores = run(lambda prompts, images, **columns: [Verdict(value=0.5, details={"why": "dim"}), 0.25], 2)
    assert values_of(scores) == [0.5, 0.25]
    assert scores.details == {"neon": ({"why": "dim"}, None)}


def test_a_reward_that_raises_leaves_its_batch_unscored_and_the_others_scored():
    def broken(prompts, images, **columns):
        raise ValueError("no such lamp")

    rewards = [Reward(name="broken", fn=broken), Reward(name="fine", fn=lambda prompts, images, **columns: [1, 0])]
    scores = score(rewards, ["p", "q"], make_images(2), max_unscored=1.0)
    assert scores.names == ("broken", "fine")
    assert scores.values_BK[:, 0].isnan().all() and scores.values_BK[:, 1].tolist() == [1.0, 0.0]
    assert scores.unscored == {"broken": {"raised ValueError: no such lamp": 2}, "fine": {}}


@pytest.mark.parametrize("returned", [[0.5], [0.5] * 3, 0.5, "ab", None, {0: 1.0, 1: 2.0}])
def test_a_wrong_number_of_values_is_an_error_that_names_the_reward(returned):
    with pytest.raises(RlhfImgError, match="reward neon returned .* for 2 images"):
        run(lambda prompts, images, **columns: returned, 2)


def test_what_is_no_number_is_an_error():
    with pytest.raises(RlhfImgError, match="neon returned 'good'"):
        run(lambda prompts, images, **columns: [1.0, "good"], 2)


def test_tensors_and_arrays_are_lists_too():
    assert values_of(run(lambda prompts, images, **columns: torch.tensor([0.5, 1.0]), 2)) == [0.5, 1.0]
    assert values_of(run(lambda prompts, images, **columns: np.array([0.5, 1.0]), 2)) == [0.5, 1.0]


def test_failing_too_often_stops_the_run_and_says_why():
    def flaky(prompts, images, **columns):
        return [1.0, None, Verdict(value=None, reason="judge timed out"), Verdict(value=None, reason="judge timed out")]

    with pytest.raises(RunStopped, match="neon left 3 of 4 images unscored.*2 x judge timed out") as stopped:
        run(flaky, max_unscored=0.5)
    assert stopped.value.exit_code == 3
    assert values_of(run(flaky, max_unscored=0.75)) == [1.0, None, None, None]


def test_async_rewards_run_together_and_beside_the_sync_ones():
    at_once = []

    class Judge:
        def __init__(self, value):
            self.value = value

        async def __call__(self, prompts, images, **columns):
            at_once.append(self.value)
            deadline = time.monotonic() + 20
            while len(at_once) < 3:  # only if all three are in flight does this end
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)
            return [self.value] * len(images)

    def sync(prompts, images, **columns):
        at_once.append(0.0)
        return [0.0] * len(images)

    async def fails(prompts, images, **columns):
        raise TimeoutError("judge is away")

    rewards = [Reward(name="a", fn=Judge(0.25)), Reward(name="b", fn=sync), Reward(name="c", fn=Judge(0.75)),
               Reward(name="d", fn=fails)]
    scores = score(rewards, ["p", "q"], make_images(2), max_unscored=1.0)
    assert scores.values_BK[:, :3].tolist() == [[0.25, 0.0, 0.75]] * 2
    assert scores.unscored["d"] == {"raised TimeoutError: judge is away": 2}
    assert list(scores.seconds) == ["a", "b", "c", "d"]


def test_scoring_works_inside_a_running_event_loop():
    async def neon(prompts, images, **columns):
        return [1.0] * len(images)

    async def notebook():
        return run(neon, 2)

    assert values_of(asyncio.run(notebook())) == [1.0, 1.0]


def test_a_group_reward_sees_one_prompt_at_a_time():
    seen = []

    def rank(prompts, images, seed, **columns):
        seen.append((prompts, [image.getpixel((0, 0))[0] for image in images], seed))
        return [i / 2 for i in range(len(images))]

    scores = run(rank, 6, group=True, group_size=3, columns={"seed": [0, 1, 2, 3, 4, 5]})
    assert seen == [(["p0", "p1", "p2"], [0, 32, 64], [0, 1, 2]), (["p3", "p4", "p5"], [96, 128, 159], [3, 4, 5])]
    assert values_of(scores) == [0.0, 0.5, 1.0] * 2


def test_a_group_that_raises_leaves_the_other_groups_scored():
    def rank(prompts, images, **columns):
        if "p0" in prompts:
            raise KeyError("p0")
        return [1.0] * len(images)

    assert values_of(run(rank, 4, group=True, group_size=2)) == [None, None, 1.0, 1.0]


def test_a_batch_that_does_not_fit_together_is_refused():
    fine = Reward(name="neon", fn=lambda prompts, images, **columns: [1.0] * len(images))
    with pytest.raises(RlhfImgError, match="2 images, but 1 entries of prompts"):
        score([fine], ["p"], make_images(2))
    with pytest.raises(RlhfImgError, match="2 images, but 3 entries of seed"):
        score([fine], ["p", "q"], make_images(2), {"seed": [1, 2, 3]})
    with pytest.raises(RlhfImgError, match="two rewards are called neon"):
        score([fine, fine], ["p", "q"], make_images(2))
    with pytest.raises(RlhfImgError, match="do not divide into groups of 3"):
        score([fine], ["p", "q"], make_images(2), group_size=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"range": (1.0, 0.0)}, "range"), ({"weight": -1.0}, "weight"), ({"floor": 0.0}, "floor"),
     ({"role": "gate", "cap": 1.5}, "cap"), ({"weight": math.nan}, "weight")],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(RlhfImgError, match=f"reward neon: {message}"):
        Reward(name="neon", fn=lambda prompts, images, **columns: [], **settings)


def grey(prompts, images, **columns):
    """Eight times the grey level of each image of `make_images`, if it comes with its own prompt."""
    assert prompts == [f"p{8 * level:.0f}" for level in images.tensor[:, 0, 0, 0].tolist()]
    return [8 * level for level in images.tensor[:, 0, 0, 0].tolist()]


def test_images_may_come_in_parts_and_in_any_order():
    threads, at_once = set(), []

    def waits(prompts, images, **columns):
        threads.add(threading.get_ident())
        assert not at_once and columns["seed"] == [int(p[1:]) for p in prompts]
        at_once.append(prompts)
        time.sleep(0.02)
        at_once.clear()
        return grey(prompts, images)

    async def slow(prompts, images, **columns):
        await asyncio.sleep(0.01 * len(prompts))
        return grey(prompts, images)

    settings = {"range": (0.0, 8.0)}
    rewards = [Reward(name="waits", fn=waits, waits=True, **settings),
               Reward(name="async", fn=slow, **settings), Reward(name="pairs", fn=slow, group=True, **settings)]
    images, order = make_images(8), [[6, 7, 0, 1], [4, 5], [2, 3]]
    with Scoring(rewards, 8, [f"p{i}" for i in range(8)], {"seed": list(range(8))}, group_size=2) as scoring:
        for rows in order:
            scoring.add(rows, Images(images.tensor[rows]))
        scores = scoring.result()
    assert scores.values_BK.tolist() == [[float(i)] * 3 for i in range(8)]
    assert torch.equal(scoring.images.tensor, images.tensor)
    assert threading.get_ident() not in threads and len(threads) == 1


def test_leaving_gives_up_what_is_in_flight():
    began, ended = threading.Event(), []

    async def hangs(prompts, images, **columns):
        began.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt), Scoring([Reward(name="neon", fn=hangs)], 2, ["p", "q"]) as scoring:
        scoring.add(range(2), make_images(2))
        assert began.wait(20)
        raise KeyboardInterrupt
    assert ended == [True]


def test_an_error_of_one_reward_does_not_wait_for_another():
    async def hangs(prompts, images, **columns):
        await asyncio.sleep(600)

    async def wrong(prompts, images, **columns):
        return [1.0]

    with pytest.raises(RlhfImgError, match="reward wrong returned 1 values for 2 images"):
        score([Reward(name="neon", fn=hangs), Reward(name="wrong", fn=wrong)], ["p", "q"], make_images(2))
