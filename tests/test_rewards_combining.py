"""Advantages: values by hand, limit cases and invariances."""

import math

import pytest
import torch

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.combining import (
    advantages,
    apply_gates,
    describe,
    extremes,
    gdpo,
    normalize_in_group,
    ties,
    weighted_sum,
)
from rlhf_img.rewards.protocol import Reward
from rlhf_img.rubrics.schema import Gate

NAN = math.nan
ONE, FLOOR = torch.ones(1), torch.tensor([0.02])


def column(*groups: list[float]) -> torch.Tensor:
    """P groups of one reward's values as (P, G, 1)."""
    return torch.tensor(groups)[..., None]


def random_rewards(seed: int = 0, p: int = 5, g: int = 6, k: int = 3) -> torch.Tensor:
    return torch.rand(p, g, k, generator=torch.Generator().manual_seed(seed))


def test_one_group_of_two_by_hand():
    # mean 0.5, population std 0.5: z = -1, +1; batch std 1, |w| = 1.
    result, metrics = gdpo(column([0.0, 1.0]), ONE, FLOOR)
    assert result.tolist() == [[-1.0, 1.0]]
    assert metrics == {"tie_rate": 0.0, "zero_spread_groups": 0.0, "advantage_std": 1.0}


def test_the_extremes_of_a_group_by_hand():
    given = torch.tensor([[0.5, -2.0, 1.0, 0.5, 0.0], [3.0, 1.0, 2.0, -1.0, -5.0]])
    result, kept = extremes(given, 2)
    assert kept.tolist() == [[False, True, True, False, False], [True, False, False, False, True]]
    assert result.tolist() == [[0.0, -1.5, 1.5, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0, -4.0]]
    for count in (0, 5, 6):
        result, kept = extremes(given, count)
        assert torch.equal(result, given) and kept.all()
    result, kept = extremes(torch.zeros(1, 6), 4)  # ties: still as many
    assert kept.sum() == 4 and not result.any()


def test_two_rewards_by_hand():
    # Group 1: z_1 = (-1, 1), z_2 = (1, -1), weights 3 and 4: C = (1, -1). Group 2: both agree: C = (-7, 7).
    rewards = torch.tensor([[[0.0, 50.0], [1.0, 10.0]], [[0.2, -3.0], [0.8, 9.0]]])
    result, _ = gdpo(rewards, torch.tensor([3.0, 4.0]), torch.tensor([0.02, 0.5]))
    # Batch std of (1, -1, -7, 7) is 5, as is |(3, 4)|.
    torch.testing.assert_close(result, torch.tensor([[0.2, -0.2], [-1.4, 1.4]]))


def test_scales_do_not_matter_to_gdpo_but_do_to_the_sum():
    rewards = random_rewards(k=2)
    scaled = rewards * torch.tensor([1.0, 100.0])
    weights = torch.ones(2)
    small, large = torch.tensor([0.01, 0.01]), torch.tensor([0.01, 1.0])
    torch.testing.assert_close(gdpo(rewards, weights, small)[0], gdpo(scaled, weights, large)[0])
    second_alone = normalize_in_group(scaled[..., 1:], large[1:])[..., 0]
    torch.testing.assert_close(weighted_sum(scaled, weights, large)[0], second_alone, atol=0.1, rtol=0)


@pytest.mark.parametrize("method", [gdpo, weighted_sum])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 123.456])
def test_equal_rewards_give_exactly_zero(method, value):
    result, metrics = method(torch.full((4, 7, 2), value), torch.tensor([0.3, 2.0]), torch.tensor([1e-6, 1e-6]))
    assert (result == 0).all()
    assert metrics == {"tie_rate": 1.0, "zero_spread_groups": 1.0, "advantage_std": 0.0}


@pytest.mark.parametrize("method", [gdpo, weighted_sum])
def test_noise_below_the_floor_stays_small(method):
    noise = 0.5 + 0.001 * torch.randn(8, 8, 1, generator=torch.Generator().manual_seed(0))
    result, metrics = method(noise, ONE, torch.tensor([0.05]))
    assert result.std() < 0.03  # 0.001 / 0.05 = 0.02, and not 1
    assert metrics["tie_rate"] == 1.0


@pytest.mark.parametrize("method", [gdpo, weighted_sum])
def test_a_shift_of_a_group_changes_nothing(method):
    rewards, weights, floors = random_rewards(), torch.tensor([1.0, 2.0, 0.5]), torch.full((3,), 0.02)
    shifted = rewards + torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(method(rewards, weights, floors)[0], method(shifted, weights, floors)[0],
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [gdpo, weighted_sum])
def test_a_permutation_within_a_group_permutes_the_advantages(method):
    rewards, weights, floors = random_rewards(), torch.tensor([1.0, 2.0, 0.5]), torch.full((3,), 0.02)
    rewards[0, 2, 1] = NAN
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(method(rewards, weights, floors)[0][:, order],
                               method(rewards[:, order], weights, floors)[0])


@pytest.mark.parametrize("method", [gdpo, weighted_sum])
def test_one_missing_value_spoils_nothing_else(method):
    rewards = column([0.0, 1.0, NAN, 0.0, 1.0], [0.2, 0.2, 0.4, 0.4, 0.3])
    result, _ = method(rewards, ONE, FLOOR)
    assert result.isfinite().all()
    assert result[0, 2] == 0  # unscored: neither good nor bad
    # The four that are scored are as if the fifth were not there.
    torch.testing.assert_close(result[0, [0, 1, 3, 4]], torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_a_value_missing_from_one_reward_leaves_the_other_reward_alone():
    both = torch.tensor([[[0.0, 0.0], [1.0, NAN], [0.5, 1.0]]])
    z = normalize_in_group(both, torch.full((2,), 0.02))
    torch.testing.assert_close(z[..., :1], normalize_in_group(both[..., :1], torch.tensor([0.02])))
    assert z[0, 1, 1] == 0 and z[0, :, 1].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("rewards", [column([NAN, NAN, NAN]), column([0.7, NAN, NAN]), column([0.7])])
def test_nothing_to_compare_gives_zero(rewards):
    result, metrics = gdpo(rewards, ONE, FLOOR)
    assert (result == 0).all()
    assert metrics["tie_rate"] == 1.0


def test_a_batch_is_scaled_down_and_never_up():
    # One of four groups has any spread; the published formula would stretch it to 2.
    rewards = column([0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5])
    assert gdpo(rewards, ONE, FLOOR)[0][0].tolist() == [-1.0, 1.0]
    # Two rewards that always agree: C = +-2, std 2, |w| = sqrt 2.
    agreeing = rewards[:1].expand(1, 2, 2)
    torch.testing.assert_close(gdpo(agreeing, torch.ones(2), torch.full((2,), 0.02))[0], torch.tensor([[-1.0, 1.0]]))


def test_gdpo_agrees_with_a_loop_written_from_the_paper():
    rewards, weights = random_rewards(3, p=4, g=8, k=3), [1.0, 0.5, 2.0]
    combined = []
    for group in rewards.double().tolist():
        for row in group:
            total = 0.0
            for k, weight in enumerate(weights):
                values = [other[k] for other in group]
                mean = sum(values) / len(values)
                std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
                total += weight * (row[k] - mean) / std
            combined.append(total)
    std = math.sqrt(sum(c * c for c in combined) / len(combined))
    expected = torch.tensor(combined).reshape(4, 8) / max(std, math.sqrt(sum(w * w for w in weights)))
    result, _ = gdpo(rewards, torch.tensor(weights), torch.full((3,), 1e-4))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_ties_are_pairs_that_no_reward_separates():
    # Pairs of group 1: (a, b) differ by 0.01 and tie; (a, c), (b, c) do not. Group 2: all three tie.
    rewards = column([0.50, 0.51, 0.90], [0.1, 0.1, 0.1])
    assert ties(rewards, FLOOR) == {"tie_rate": pytest.approx(4 / 6), "zero_spread_groups": 0.5}
    second = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])[..., None]
    both = ties(torch.cat([rewards, second], dim=-1), torch.tensor([0.02, 0.5]))
    assert both == {"tie_rate": pytest.approx(1 / 6), "zero_spread_groups": 0.0}


def reward(name: str, **settings: object) -> Reward:
    return Reward(name=name, fn=lambda prompts, images, **columns: [], **settings)


def test_a_gate_caps_objectives_in_their_own_range():
    rewards = [reward("likes", range=(-10.0, 10.0)), reward("rubric"), reward("safe", role="gate", below=0.5, cap=0.2)]
    values = torch.tensor([[[8.0, 0.9, 0.4], [8.0, 0.1, 0.4], [8.0, 0.9, 0.5], [8.0, 0.9, NAN], [NAN, 0.9, 0.0]]])
    gated, metrics = apply_gates(values, rewards)
    expected = torch.tensor([[[-6.0, 0.2, 0.4], [-6.0, 0.1, 0.4], [8.0, 0.9, 0.5], [8.0, 0.9, NAN], [NAN, 0.2, 0.0]]])
    torch.testing.assert_close(gated, expected, equal_nan=True)
    assert metrics == {"gate/safe/caught": 0.6}


def test_a_rubrics_gate_holds_for_its_prompt_only_and_spares_its_own_reward():
    rewards = [reward("rubric"), reward("artifact")]
    values = torch.tensor([[[0.9, 0.3], [0.9, 0.8]], [[0.9, 0.3], [0.9, 0.8]]])
    gates = [[Gate(reward="artifact", below=0.35, cap=0.2)], [Gate(reward="neon", below=0.5, cap=0.1)]]
    gated, metrics = apply_gates(values, rewards, gates)
    torch.testing.assert_close(gated, torch.tensor([[[0.2, 0.3], [0.9, 0.8]], [[0.9, 0.3], [0.9, 0.8]]]))
    assert metrics == {"gate/artifact/caught": 0.25, "gate/neon/inactive": 1.0}


def test_a_reward_that_is_both_caps_the_others_and_keeps_its_own_slope():
    rewards = [reward("rubric"), reward("artifact", role="both", below=0.8, cap=0.2)]
    values = torch.tensor([[[0.9, 0.1], [0.9, 0.5], [0.9, 0.9]]])
    gated, metrics = apply_gates(values, rewards)
    torch.testing.assert_close(gated, torch.tensor([[[0.2, 0.1], [0.2, 0.5], [0.9, 0.9]]]))
    assert metrics == {"gate/artifact/caught": pytest.approx(2 / 3)}
    result, _ = advantages(rewards, values)
    assert result[0, 0] < result[0, 1] < result[0, 2], "of two caught images the sounder one is better"
    as_gate, _ = advantages([rewards[0], reward("artifact", role="gate", below=0.8, cap=0.2)], values)
    assert as_gate[0, 0] == as_gate[0, 1] < as_gate[0, 2]


def test_a_gate_needs_a_finite_range_to_cap():
    rewards = [reward("likes", range=(-math.inf, math.inf)), reward("safe", role="gate")]
    with pytest.raises(RlhfImgError, match="likes has the range"):
        apply_gates(torch.zeros(1, 2, 2), rewards)


def test_gates_are_not_summed_and_what_they_catch_falls_behind():
    rewards = [reward("rubric", weight=2.0), reward("safe", role="gate", below=0.5, cap=0.2)]
    values = torch.tensor([[[1.0, 0.0], [0.6, 1.0], [0.6, 0.9]]])
    result, metrics = advantages(rewards, values)
    assert result[0, 0] < 0 < result[0, 1] == result[0, 2]
    assert metrics["gate/safe/caught"] == pytest.approx(1 / 3)
    assert metrics["reward/rubric/mean"] == pytest.approx(2.2 / 3)  # as scored, before the gate


def test_describe_leaves_out_what_it_does_not_know():
    rewards = [reward("rubric"), reward("judge")]
    values = torch.tensor([[[0.0, NAN], [1.0, NAN]], [[1.0, NAN], [NAN, NAN]]])
    assert describe(rewards, values) == {
        "reward/rubric/unscored": 0.25,
        "reward/rubric/mean": pytest.approx(2 / 3),
        "reward/rubric/std": pytest.approx(math.sqrt(2) / 3),
        "reward/rubric/group_std": pytest.approx(0.25),  # 0.5 in the first group, 0 in the second
        "reward/judge/unscored": 1.0,
    }


def test_what_cannot_be_combined():
    with pytest.raises(RlhfImgError, match='did you mean "gdpo"'):
        advantages([reward("rubric")], torch.zeros(1, 2, 1), method="gpdo")
    with pytest.raises(RlhfImgError, match="no reward of this run is an objective; at least one must be"):
        advantages([reward("safe", role="gate")], torch.zeros(1, 2, 1))
    with pytest.raises(RlhfImgError, match="not all 0"):
        gdpo(torch.zeros(1, 2, 1), torch.zeros(1), FLOOR)
    with pytest.raises(RlhfImgError, match="floors are above 0"):
        gdpo(torch.zeros(1, 2, 1), ONE, torch.zeros(1))
