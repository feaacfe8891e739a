"""The prompt pool's mathematics, its file and its texts: values by hand, limit cases, and what a user gets wrong."""

import logging
import math
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards import Images, Reward, advantages, learnable, repeat_noise
from rlhf_img.rewards.signal import group_std, mute
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.pool import store
from rlhf_img.training.pool.clusters import by_encoder, by_words, cluster, typical_words
from rlhf_img.training.pool.duplicates import near_duplicates
from rlhf_img.training.pool.normal import normal_form
from rlhf_img.training.pool.run import PromptPool
from rlhf_img.training.pool.store import PoolFile
from rlhf_img.training.pool.weights import (
    MEMORY,
    Group,
    PoolConfig,
    Statistics,
    about_one_length,
    draw_weighted,
    effective_number,
    expected_signal,
    resting,
    sampling_weights,
)
from rlhf_img.training.prompts import Prompt

NAN = math.nan
CONFIG = PoolConfig(curriculum=True, explore=0.2, patience=2, rest=10)
GOOD, FLAT = Group(0.5, 0.25, False), Group(1.0, 0.0, True)


def known(groups: list[int], variances: list[float]) -> Statistics:
    stats = Statistics.unknown(len(groups))
    stats.groups_N[:], stats.variance_N[:] = groups, variances
    return stats


# Weights


def test_the_expected_signal_by_hand() -> None:
    # All: (4 * .25 + 4 * .05) / 8 = .15. Clusters, with 4 groups of that: (1 + .6) / 8 = .2 and (.2 + .6) / 8 = .1.
    # Prompts, with 4 groups of their cluster's: (1 + .8) / 8, (.2 + .4) / 8, and the unseen one is as its cluster is.
    found = expected_signal(known([4, 4, 0], [0.25, 0.05, 0.0]), np.array([0, 1, 1]))
    np.testing.assert_allclose(found, [0.225, 0.075, 0.1])


def test_the_weights_by_hand() -> None:
    found = sampling_weights(known([4, 4, 0], [0.25, 0.05, 0.0]), np.array([0, 1, 1]), 1, CONFIG)
    # u = 1, 2^-1/2, 2^-1/2; u e = .225, .05303, .07071, sum .34874; u / sum u = .41421, .29289, .29289
    by_hand = [0.8 * 0.64517 + 0.2 * 0.41421, 0.8 * 0.15207 + 0.2 * 0.29289, 0.8 * 0.20276 + 0.2 * 0.29289]
    np.testing.assert_allclose(found, by_hand, atol=1e-4)
    assert found.sum() == pytest.approx(1.0)


def test_nothing_known_is_uniform_and_so_is_exploring_alone() -> None:
    clusters = np.zeros(5, np.int64)
    np.testing.assert_allclose(sampling_weights(Statistics.unknown(5), clusters, 1, CONFIG), 0.2)
    only = PoolConfig(curriculum=True, explore=1.0)
    np.testing.assert_allclose(sampling_weights(known([9] * 5, [0.1, 0.2, 0, 0, 0.3]), clusters, 1, only), 0.2)


def test_a_prompt_between_solved_and_hopeless_is_drawn_most_and_the_floor_holds_for_all() -> None:
    rates = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    found = sampling_weights(known([MEMORY] * 5, (rates * (1 - rates)).tolist()), np.zeros(5, np.int64), 1, CONFIG)
    assert found.argmax() == 2 and found[1] == pytest.approx(found[3])
    assert found[0] == pytest.approx(found[4]) and (found >= CONFIG.explore / 5).all()
    assert found[2] > 2 * found[0]


def test_no_spread_anywhere_leaves_exploration() -> None:
    found = sampling_weights(known([3, 3], [0.0, 0.0]), np.zeros(2, np.int64), 1, CONFIG)
    np.testing.assert_allclose(found, 0.5)


def test_a_cluster_of_many_is_drawn_by_the_root_of_its_size() -> None:
    clusters = np.array([0] * 100 + [1] * 4)
    found = sampling_weights(Statistics.unknown(104), clusters, 1, CONFIG)
    assert found[:100].sum() / found[100:].sum() == pytest.approx(math.sqrt(100 / 4))


def test_a_prompt_without_spread_rests_returns_slowly_and_stays_once_it_spreads() -> None:
    stats, clusters = Statistics.unknown(2), np.zeros(2, np.int64)
    for clock in (4, 5):
        stats.record(0, FLAT, clock)
    assert [bool(resting(stats, clock, CONFIG)[0]) for clock in (6, 14, 15)] == [True, True, False]
    weights = sampling_weights(stats, clusters, 6, CONFIG)
    assert weights.tolist() == [0.0, 1.0]
    assert sampling_weights(stats, clusters, 15, CONFIG)[0] > 0
    stats.record(0, FLAT, 15)  # tried again, and still nothing: twice as long
    assert [bool(resting(stats, clock, CONFIG)[0]) for clock in (34, 35)] == [True, False]
    stats.record(0, GOOD, 35)
    assert not resting(stats, 36, CONFIG)[0] and stats.flat_N[0] == 0
    stats.flat_N[0] = 1000  # 64 times at most
    assert [bool(resting(stats, 35 + gone, CONFIG)[0]) for gone in (639, 640)] == [True, False]


def test_where_too_few_are_awake_all_are() -> None:
    stats = Statistics.unknown(3)
    stats.flat_N[:] = [5, 5, 0]
    assert np.count_nonzero(sampling_weights(stats, np.zeros(3, np.int64), 1, CONFIG, least=2)) == 3
    assert np.count_nonzero(sampling_weights(stats, np.zeros(3, np.int64), 1, CONFIG, least=1)) == 1


def test_averages_by_hand_first_plain_then_fading() -> None:
    stats = Statistics.unknown(1)
    for i, score in enumerate([1.0, 0.0, 0.5, 0.1]):
        stats.record(0, Group(score, score / 2, False), i)
    assert stats.score_N[0] == pytest.approx(0.4) and stats.variance_N[0] == pytest.approx(0.2)
    assert stats.groups_N[0] == 4 and stats.last_N[0] == 3
    for i in range(4, 12):
        stats.record(0, Group(0.4, 0.2, False), i)
    stats.record(0, Group(1.2, 1.0, False), 12)
    assert stats.score_N[0] == pytest.approx(0.4 + 0.8 / MEMORY)
    stats.record(0, Group(None, 0.3, False), 13)  # of a reward without a finite range
    assert stats.score_N[0] == pytest.approx(0.5) and stats.variance_N[0] == pytest.approx(0.3)


def test_draws_follow_the_weights_and_never_repeat_or_take_what_has_none() -> None:
    weights, rng = np.array([0.5, 0.3, 0.2, 0.0]), np.random.default_rng(0)
    first = np.bincount([draw_weighted(weights, 1, rng)[0] for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(first, weights, atol=0.03)
    assert all(len(set(draw_weighted(weights, 2, rng))) == 2 for _ in range(50))
    many = draw_weighted(weights, 7, rng)  # all of them twice, then one more
    assert sorted(many[:3]) == sorted(many[3:6]) == [0, 1, 2] and len(many) == 7


def test_an_iteration_s_prompts_are_about_as_long_and_each_keeps_its_weight() -> None:
    rng = np.random.default_rng(0)
    weights, lengths = rng.dirichlet(np.full(1000, 4.0)), rng.integers(5, 25, 1000)
    windows = [about_one_length(weights, lengths, 8, at) for at in np.arange(0, 1, 1 / 640)]
    np.testing.assert_allclose(np.mean(windows, 0), weights, atol=1e-12)
    spans = [np.ptp(lengths[window > 0]) for window in windows if not (window[lengths == 24] > 0).any()]
    assert max(spans) <= 2 and len(spans) > 500  # the windows left out go on from the longest to the shortest
    few = about_one_length(weights[:30] / weights[:30].sum(), lengths[:30], 8, 0.3)  # no choice but all
    np.testing.assert_allclose(few, weights[:30] / weights[:30].sum())


def test_the_effective_number_by_hand() -> None:
    assert effective_number(np.full(8, 1 / 8)) == pytest.approx(8)
    assert effective_number(np.array([0.5, 0.25, 0.25])) == pytest.approx(1 / 0.375)


@pytest.mark.parametrize("bad", [{"explore": 0.0}, {"explore": 1.1}, {"patience": 0}, {"rest": 0}])
def test_settings_out_of_range_are_said(bad: dict[str, float]) -> None:
    with pytest.raises(RlhfImgError, match=f"pool.{next(iter(bad))}"):
        PoolConfig(**bad)  # type: ignore[arg-type]


# What a group has to teach


def reward(name: str = "a", **more: object) -> Reward:
    return Reward(name=name, fn=lambda prompts, images: [0.5] * len(prompts), **more)  # type: ignore[arg-type]


def column(*groups: list[float]) -> torch.Tensor:
    return torch.tensor(groups)[..., None]


def test_the_spread_within_a_group_by_hand_and_exactly_zero_for_equal_values() -> None:
    values = column([0.0, 1.0, NAN, 1.0], [0.1, 0.1, 0.1, 0.1], [NAN] * 4, [0.7, NAN, NAN, NAN])
    torch.testing.assert_close(group_std(values), torch.tensor([[math.sqrt(2 / 9)], [0.0], [0.0], [0.0]]))
    assert group_std(values)[1] == 0


def test_the_variance_of_a_pass_rate_is_p_times_one_minus_p_on_average() -> None:
    passes = (torch.rand(20_000, 8, 1, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    score, variance, _ = learnable([reward()], passes, {})
    assert score.mean().item() == pytest.approx(0.3, abs=0.01)
    assert variance.mean().item() == pytest.approx(0.3 * 0.7, abs=0.005)


def test_two_objectives_by_hand_with_a_gate_left_out_and_ranges_scaled() -> None:
    rewards = [reward("a", weight=3.0), reward("g", role="gate"), reward("b", range=(0.0, 10.0), floor=0.2)]
    values = torch.tensor([[[0.0, 0.9, 5.0], [1.0, 0.1, 5.0]], [[NAN, 0.5, 2.0], [0.5, 0.5, 4.0]]])
    score, variance, flat = learnable(rewards, values, {})
    # Group 1: scores .5 and .5; variances 1/2 and 0, weighed 3 to 1. Group 2: of a only one is scored; b: .3 and .02.
    torch.testing.assert_close(score, torch.tensor([0.5, 0.3], dtype=torch.float64))
    torch.testing.assert_close(variance, torch.tensor([0.375, 0.02], dtype=torch.float64))
    assert flat.tolist() == [0.0, 0.0]


def test_unscored_groups_say_nothing_and_an_infinite_range_has_no_difficulty() -> None:
    score, variance, flat = learnable([reward()], column([NAN, NAN], [NAN, 1.0]), {})
    assert score.isnan().all() and variance.isnan().all() and flat.isnan().all()
    open_ended = reward(range=(-math.inf, math.inf), floor=0.1)
    score, variance, flat = learnable([open_ended], column([0.0, 5.0], [1.0, 1.1]), {})
    assert score.isnan().all() and flat.tolist() == [0.0, 1.0]
    assert variance[0].item() == pytest.approx(12.5 / 25)  # in units of 50 floors


def test_a_spread_below_the_repeat_noise_is_no_spread_and_gives_no_advantage() -> None:
    values = column([0.40, 0.46], [0.1, 0.9])
    assert learnable([reward()], values, {})[2].tolist() == [0.0, 0.0]
    assert learnable([reward()], values, {"a": 0.05})[2].tolist() == [1.0, 0.0]
    loud, _ = advantages([reward()], values)
    quiet, metrics = advantages([reward()], values, noise={"a": 0.05})
    assert loud[0].abs().min() > 0 and quiet[0].tolist() == [0.0, 0.0] and quiet[1].abs().min() > 0
    assert metrics["reward/a/below_noise"] == 0.5 and metrics["zero_spread_groups"] == 0.5
    assert metrics["reward/a/mean"] == pytest.approx(0.465)  # what is reported is not muted
    unchanged, metrics = advantages([reward()], values, noise={"a": 0.0})
    assert torch.equal(unchanged, loud) and "reward/a/below_noise" not in metrics


def test_noise_mutes_one_reward_and_not_the_other() -> None:
    values = torch.tensor([[[0.50, 0.0], [0.52, 1.0]]])
    found = mute(values, torch.tensor([0.05, 0.05]))
    assert found[..., 0].isnan().all() and torch.equal(found[..., 1], values[..., 1])


def test_repeat_noise_is_measured_and_zero_for_what_always_says_the_same() -> None:
    rng = np.random.default_rng(0)

    def shaky(prompts: list[str], images: Images, **columns: object) -> list[float]:
        return [float(0.5 + 0.1 * rng.standard_normal()) for _ in prompts]

    def partly(prompts: list[str], images: Images, **columns: object) -> list[float | None]:
        return [None] * len(prompts)

    some = [Reward(name="shaky", fn=shaky), reward("steady"), Reward(name="none", fn=partly), reward("g", role="gate")]
    found = repeat_noise(some, ["x"] * 64, Images(torch.rand(64, 3, 4, 4)), {}, 64)
    assert found["steady"] == 0.0 and found.keys() == {"shaky", "steady"}
    assert found["shaky"] == pytest.approx(0.1, rel=0.12)


# The file


def pool_of(path: Path, *texts: str) -> PoolFile:
    file = PoolFile.create(path)
    file.add([(text, None) for text in texts], "test")
    return file


def test_what_is_there_in_another_spelling_is_not_added_again(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", "A red cat.", "a dog")
    assert file.add([("a  red cat", None), ("a bird", None), ("a bird!", None)], "more") == (1, 2)
    found = [(entry.text, entry.source) for entry in file.entries()]
    assert found == [("A red cat.", "test"), ("a dog", "test"), ("a bird", "more")]


def test_a_rubric_is_taken_over_where_there_was_none(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", "a red cat")
    assert file.add([("A red cat", "first"), ("a red cat", "second")], "more") == (0, 2)
    assert [(e.text, e.rubric) for e in file.entries()] == [("a red cat", "first")]


def test_normal_forms() -> None:
    assert normal_form("A Red\tCAT ,") == "a red cat"
    assert normal_form("a sign “OPEN”") != normal_form("a sign “open”")  # they are to be drawn as they are
    assert normal_form("a sign “OPEN”.") == normal_form('A sign "OPEN"')


def test_an_addition_that_fails_adds_nothing(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", "one")

    def broken():
        yield "two", None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        file.add(broken(), "broken")
    assert [e.text for e in file.entries()] == ["one"]


def test_retired_prompts_stay_with_what_is_known(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", "one", "two")
    one, two = file.entries()
    file.publish("run", 1, [(1, one.id, GOOD)])
    file.retire({one.id: "by hand"})
    assert [e.text for e in file.entries()] == ["two"]
    assert [(e.text, e.retired) for e in file.entries(retired=True)] == [("one", "by hand"), ("two", None)]
    file.retire({one.id: None})
    assert len(file.entries()) == 2 and file.statistics([two.id, one.id]).groups_N.tolist() == [0, 1]


def test_published_groups_are_those_recorded_once_each_whatever_is_repeated(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", "one", "two")
    ids = [e.id for e in file.entries()]
    observed = [(1, ids[0], GOOD), (1, ids[1], FLAT), (3, ids[1], FLAT), (4, ids[0], Group(None, 0.1, False))]
    expected = Statistics.unknown(2)
    for step, id, group in observed:
        expected.record(ids.index(id), group, step)
    file.publish("run", 1, observed[:2])
    file.publish("run", 1, observed[:2])
    file.publish("run", 4, observed)  # with what was published before
    file.publish("run", 3, observed)  # of a checkpoint before the last
    found = file.statistics(ids)
    for name in ("groups", "score", "variance", "flat", "last"):
        np.testing.assert_array_equal(getattr(found, f"{name}_N"), getattr(expected, f"{name}_N"))
    assert file.clock == 4
    file.publish("other", 2, [(2, ids[0], GOOD)])
    assert file.clock == 6 and file.statistics(ids).last_N.tolist() == [6, 3]


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", "one", "two")
    ids = [e.id for e in file.entries()]

    def write(run: str) -> None:
        for step in range(1, 16):
            PoolFile(file.path).publish(run, step, [(step, id, GOOD) for id in ids])

    writers = [threading.Thread(target=write, args=(run,)) for run in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.statistics(ids).groups_N.tolist() == [30, 30] and file.clock == 30


def test_a_file_that_is_no_pool_damaged_newer_or_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(RlhfImgError, match="there is no prompt pool .*rlhf-img prompts add"):
        PoolFile(tmp_path / "none.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("no database, but long enough to have a header " * 50)
    with pytest.raises(RlhfImgError, match="no SQLite file"):
        PoolFile(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE prompts (text)")
    connection.close()
    for opened in (PoolFile, PoolFile.create):
        with pytest.raises(RlhfImgError, match="no prompt pool; give another path"):
            opened(other)
    newer = pool_of(tmp_path / "newer.sqlite", "one").path
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(RlhfImgError, match="of version 9, and this rlhf-img reads version 1"):
        PoolFile(newer)
    with pytest.raises(RlhfImgError, match="is no folder"):
        PoolFile.create(tmp_path / "no" / "p.sqlite")


def test_a_damaged_pool_is_said(tmp_path: Path) -> None:
    file = pool_of(tmp_path / "p.sqlite", *(f"prompt number {i}" for i in range(2000)))
    content = bytearray(file.path.read_bytes())
    content[4096:] = b"\x55" * (len(content) - 4096)
    file.path.write_bytes(content)
    with pytest.raises(RlhfImgError, match="is damaged; restore a copy"):
        file.entries()


def test_a_pool_in_use_makes_a_run_wait_for_its_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "_PATIENCE_S", 0.05)
    origin = pool_of(tmp_path / "p.sqlite", "one", "two")
    origin.copy_to(tmp_path / "copy.sqlite")
    pool = PromptPool([Prompt("one"), Prompt("two")], PoolConfig(), 0, tmp_path / "copy.sqlite")
    pool.draw(1, 2)
    pool.record(1, [reward()], column([0.0, 1.0], [0.2, 0.4]), [(), ()])
    holder = sqlite3.connect(origin.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with caplog.at_level(logging.WARNING):
        pool.publish()
    assert "another process is writing to it" in caplog.text
    holder.execute("ROLLBACK")
    holder.close()
    assert origin.clock == 0
    pool.publish()
    assert origin.clock == 1 and origin.statistics([1, 2]).groups_N.tolist() == [1, 1]


# A run's pool


def value_of(prompt: Prompt, step: int, group: int = 4) -> list[float]:
    """Prompts 0 to 3 are solved, 4 to 7 spread, whatever is drawn when."""
    noise = np.random.default_rng((int(prompt.text), step)).random(group)
    return [1.0] * group if int(prompt.text) < 4 else noise.tolist()


def iterate(pool: PromptPool, steps: range, count: int = 2) -> list[list[str]]:
    drawn = []
    for step in steps:
        some = pool.draw(step, count)
        pool.record(step, [reward()], column(*(value_of(prompt, step) for prompt in some)), [()] * count)
        drawn.append([prompt.text for prompt in some])
    return drawn


PROMPTS = [Prompt(str(i)) for i in range(8)]


def test_a_run_learns_to_draw_what_spreads_and_rests_what_is_solved() -> None:
    drawn = iterate(PromptPool(PROMPTS, CONFIG, seed=0), range(1, 201))
    late = [text for some in drawn[100:] for text in some]
    assert np.mean([int(text) >= 4 for text in late]) > 0.85
    assert {text for some in drawn[:30] for text in some} == set("01234567")
    assert any(int(text) < 4 for text in late)  # tried again, slowly


def test_without_a_curriculum_prompts_take_turns_as_ever() -> None:
    pool = PromptPool(PROMPTS, PoolConfig(), seed=3)
    turns = [prompt_room.turns(np.zeros(len(PROMPTS), int), 2, step, 3) for step in range(9)]
    expected = [[PROMPTS[i].text for i in turn] for turn in turns]
    assert iterate(pool, range(1, 10)) == expected


def test_a_restored_pool_draws_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = PromptPool(PROMPTS, CONFIG, seed=0)
    expected = iterate(whole, range(1, 41))
    first = PromptPool(PROMPTS, CONFIG, seed=0)
    first.noise = {"a": 0.01}
    iterate(first, range(1, 21))
    first.save(tmp_path)
    second = PromptPool(PROMPTS, CONFIG, seed=0)
    second.load(tmp_path)
    assert second.noise == {"a": 0.01} and iterate(second, range(21, 41)) == expected[20:]
    with pytest.raises(RlhfImgError, match="knows 8 prompts, and the run has 3"):
        PromptPool(PROMPTS[:3], CONFIG, seed=0).load(tmp_path)
    (tmp_path / "pool.safetensors").write_bytes(b"damaged")
    with pytest.raises(RlhfImgError, match="cannot be read .*delete it to resume from an earlier one"):
        second.load(tmp_path)


def test_the_metrics_of_a_run_by_hand() -> None:
    pool = PromptPool(PROMPTS[:2], CONFIG, seed=0)
    pool.draw(1, 2)
    found = pool.record(1, [reward()], column([0.0, 1.0], [1.0, 1.0]), [(), ()])
    assert found == {
        "pool/seen": 1.0, "pool/difficulty": 0.25, "pool/spread": 0.5, "pool/retired": 0.0, "pool/effective": 2.0,
    }  # fmt: skip
    unscored = PromptPool(PROMPTS[:2], CONFIG, seed=0)
    unscored.draw(1, 2)
    found = unscored.record(1, [reward()], column([NAN, NAN], [NAN, NAN]), [(), ()])
    assert found == {"pool/seen": 0.0, "pool/retired": 0.0, "pool/effective": 2.0}


# Texts


def test_near_duplicates_are_found_unless_they_ask_for_different_things() -> None:
    texts = [
        "a wide photograph of a quiet harbour at dawn with a red boat",
        "a quiet harbour at dawn with a red boat, wide photograph",
        "a wide photograph of a quiet harbour at dawn with a blue boat",
        "two stars above a green cross on grey",
        "three stars above a green cross on grey",
        "an old lighthouse in a storm",
    ]
    assert near_duplicates([Prompt(text) for text in texts], 0.7) == {1: 0}
    assert near_duplicates([Prompt(text) for text in texts], 0.95) == {}
    with pytest.raises(RlhfImgError, match="between 0 and 1"):
        near_duplicates([], 1.5)


def themes() -> list[str]:
    common = [f"a {colour} {thing} on a table" for colour in ("red", "blue", "green", "pink") for thing in
              ("cup", "plate", "bowl", "spoon", "glass", "fork")]
    return common * 8 + ["astronaut riding horse nebula", "astronaut floating nebula", "astronaut horse moon nebula"]


def check_clusters(vectors: np.ndarray) -> None:
    labels = cluster(vectors, 6)
    assert set(labels.tolist()) == set(range(labels.max() + 1)) and labels.max() >= 2
    rare = labels[-3:].tolist()
    assert not set(rare) & set(labels[:-3].tolist())  # 3 of 195 have clusters of their own
    assert np.array_equal(labels, cluster(vectors, 6))


def test_a_rare_theme_has_a_cluster_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_img.training.pool import clusters

    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None if name == "faiss" else name)
    check_clusters(by_words(themes()))
    with pytest.raises(RlhfImgError, match="cannot be divided into 500 clusters"):
        cluster(by_words(themes()), 500)


def test_with_faiss_too() -> None:
    pytest.importorskip("faiss")
    check_clusters(by_words(themes()))


def test_a_model_s_embeddings_are_means_over_tokens_less_what_is_common() -> None:
    features = {"a": torch.tensor([[1.0, 0.0], [3.0, 0.0]]), "b": torch.tensor([[2.0, 4.0]])}
    # Means (2, 0) and (2, 4), less (2, 2), of length 1.
    np.testing.assert_allclose(by_encoder(lambda some: [features[t] for t in some], ["a", "b"]), [[0, -1], [0, 1]])


def test_words_name_a_cluster() -> None:
    cats = ["a cat on grey", "a cat, running"]
    assert typical_words(cats, [*cats, "a dog on grey"], 1) == ["cat"]
