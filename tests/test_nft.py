"""NFT: its loss by hand, its fixed point in closed form, its relation to AWM's gradient, and the old policy."""

import dataclasses

import pytest
import torch
from tiny import PROMPTS, tiny_model
from torch import Tensor

from rlhf_img.algorithms import nft
from rlhf_img.algorithms.nft import NFTConfig, decay, nft_loss
from rlhf_img.algorithms.rollout import Draw, Rollout, noised, rollout
from rlhf_img.algorithms.updating import together
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.lora import role_parameters
from rlhf_img.model.policy import LoRAConfig, Policy, make_policy

PLAIN = NFTConfig(prompts=3, group=2, num_steps=4, draws=2, normalise=False, kl=0.0, scale=1.0, hold=0.0)
ONE = torch.ones(1)


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor([[[value]]]) for value in values]


def test_loss_by_hand() -> None:
    v, old, target = scalars(0.5, 0.2, 1.0)
    config = dataclasses.replace(PLAIN, beta=0.5, scale=2.0)
    # q = (1/2)/2 + 1/2 = 0.75; v+ = 0.35, v- = 0.05; (0.75 * 0.65^2 + 0.25 * 0.95^2) * 2 / 0.5
    loss = nft_loss(v, old, target, 0.8 * ONE, ONE, config)
    assert loss.item() == pytest.approx((0.75 * 0.65**2 + 0.25 * 0.95**2) * 4, rel=1e-5)
    # with the normaliser: sigma e^2 / |e| = sigma |e|
    normalised = nft_loss(v, old, target, 0.8 * ONE, ONE, dataclasses.replace(config, normalise=True))
    assert normalised.item() == pytest.approx(0.8 * (0.75 * 0.65 + 0.25 * 0.95) * 4, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_fixed_point_is_the_old_velocity_and_a_finite_step_towards_good_and_away_from_bad(beta: float) -> None:
    """For one x there are several images behind it; least is v_old + E[(2 q - 1) (u - v_old)] / beta."""
    generator = torch.Generator().manual_seed(0)
    target, advantage = torch.randn(64, 3, 2, generator=generator), torch.randn(64, generator=generator) / 2
    old = torch.randn(3, 2, generator=generator)
    config = dataclasses.replace(PLAIN, beta=beta)
    v = old.clone().requires_grad_()
    everywhere = old.expand(64, -1, -1)
    optimizer = torch.optim.LBFGS([v], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nft_loss(v.expand(64, -1, -1), everywhere, target, torch.ones(64), advantage, config).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    step = (advantage.clamp(-1, 1)[:, None, None] * (target - old)).mean(0) / beta
    torch.testing.assert_close(v.detach(), old + step, atol=1e-4, rtol=1e-4)


def test_gradient_at_the_old_policy_is_the_advantage_times_the_flow_matching_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(4, 3, 2, generator=generator).requires_grad_()
    target, advantage = torch.randn(4, 3, 2, generator=generator), torch.tensor([1.0, -1.0, 0.5, 0.0])
    for beta in (0.1, 1.0):  # beta only matters away from it
        config = dataclasses.replace(PLAIN, beta=beta, scale=5.0)
        (got,) = torch.autograd.grad(nft_loss(v, v.detach(), target, torch.ones(4), advantage, config).sum(), v)
        matching = 2 * (v.detach() - target) / 6
        torch.testing.assert_close(got, advantage[:, None, None] * matching, atol=1e-5, rtol=1e-4)


def test_an_advantage_beyond_the_scale_counts_as_the_scale() -> None:
    v, old, target = scalars(0.5, 0.2, 1.0)
    config = dataclasses.replace(PLAIN, scale=2.0)
    assert nft_loss(v, old, target, ONE, 9 * ONE, config) == nft_loss(v, old, target, ONE, 2 * ONE, config)


def test_published_schedules() -> None:
    assert [decay("none", i) for i in (1, 500)] == [0.0, 0.0]
    assert [decay("fast", i) for i in (1, 100, 500, 900)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    assert [decay("slow", i) for i in (75, 79, 300)] == pytest.approx([0.0, 0.03, 0.999])


@pytest.mark.parametrize("setting", [{"beta": 0.0}, {"kl": -1.0}, {"scale": 0.0}, {"group": 1}])
def test_impossible_settings_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(RlhfImgError, match=rf"nft\..*{next(iter(setting))}.*must be"):
        NFTConfig(**setting)  # type: ignore[arg-type]


@pytest.fixture
def world() -> tuple[Policy, Rollout]:
    """A policy that has left its average, as in the middle of a run, and a rollout."""
    model = tiny_model()
    policy = make_policy(model.transformer, LoRAConfig(rank=4, alpha=4.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in role_parameters(model.transformer, policy.name).items():
        if name.endswith("lora_B"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, noised(policy, rollout(model, policy, Conditioner(model), PROMPTS[:3], PLAIN, seed=5), PLAIN)


def test_the_old_policy_draws_and_its_velocities_are_kept(world: tuple[Policy, Rollout]) -> None:
    policy, sampled = world
    with policy.averaged():  # it still is the base: B = 0
        now = [nft.draws_loss(policy, sampled, draws, torch.ones(len(draws.rows_B)), PLAIN)[1]["old_distance"]
               for batch in sampled.batches for draws in together(batch, 64)]  # fmt: skip
    assert torch.cat(now).max() < 1e-10
    away = [nft.draws_loss(policy, sampled, draws, torch.ones(len(draws.rows_B)), PLAIN)[1]["old_distance"]
            for batch in sampled.batches for draws in together(batch, 64)]  # fmt: skip
    assert torch.cat(away).min() > 1e-6
    assert all(isinstance(term, Draw) and term.old_BNC is not None for b in sampled.batches for term in b.terms)


def test_an_update_fits_what_was_good_and_moves_the_old_policy_by_the_schedule(world: tuple[Policy, Rollout]) -> None:
    policy, sampled = world
    policy._write(policy.average)  # the first iteration: nothing has moved
    before = {name: value.clone() for name, value in policy.average.items()}
    advantages = torch.tensor([1.0, -1.0] * 3)

    def errors() -> Tensor:
        found = torch.zeros(6)
        for batch in sampled.batches:
            for draws in together(batch, 64):
                with policy.acting() as transformer, torch.no_grad():
                    v = nft.velocities(policy, sampled, draws.x_BNC, draws.sigma_B, draws.text_BLD, None)[0]
                    assert transformer is policy.transformer
                found.index_add_(0, torch.tensor(draws.rows_B), (v - draws.target_BNC).square().flatten(1).mean(1))
        return found

    first = errors()
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=1e-2)
    metrics = nft.update(policy, optimizer, sampled, advantages, PLAIN, iteration=400)
    assert ((errors() - first) * advantages).sum() < 0
    assert metrics["old_distance"] == pytest.approx(0, abs=1e-12) and metrics["grad_norm"] > 0
    for name, parameter in policy.parameters.items():
        torch.testing.assert_close(policy.average[name], 0.4 * before[name] + 0.6 * parameter.detach())


def test_below_the_levels_that_are_trained_the_policy_is_held_to_the_reference(world: tuple[Policy, Rollout]) -> None:
    policy, sampled = world
    config = dataclasses.replace(PLAIN, hold=0.3, min_sigma=0.95, max_sigma=1.0)  # all of these draws lie below
    for batch in sampled.batches:
        for draws in together(batch, 64):
            loss_B, metrics = nft.draws_loss(policy, sampled, draws, torch.ones(len(draws.rows_B)), config)
            assert (metrics["kl"] > 0).all()
            torch.testing.assert_close(loss_B.detach(), 0.3 * metrics["kl"])


def test_equal_rewards_give_no_gradient(world: tuple[Policy, Rollout]) -> None:
    policy, sampled = world
    policy._write(policy.average)
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=1.0)
    assert nft.update(policy, optimizer, sampled, torch.zeros(6), PLAIN, iteration=1)["grad_norm"] < 1e-6
