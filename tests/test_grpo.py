"""GRPO: its losses by hand, its gradient against a loop written from the papers, and a rollout that replays exactly."""

import dataclasses
import math

import pytest
import torch
from tiny import PROMPTS, tiny_model
from torch import Tensor

from rlhf_img.algorithms import grpo
from rlhf_img.algorithms.awm import forward_logp
from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import Batch, Draw, Rollout, Step, noised, rollout
from rlhf_img.algorithms.updating import split, together
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import cps_step, sigmas
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import LoRAConfig, Policy, make_policy
from rlhf_img.model.sampling import initial_noise
from rlhf_img.training.preflight import check_ratios

CONFIG = GRPOConfig(
    prompts=3, group=2, num_steps=4, likelihood="steps", window=2, clip=1e-3, kl=0.0, reference_guidance=0.0, lr=1e-2
)
FORWARD = dataclasses.replace(CONFIG, likelihood="forward", draws=2, hold=0.0)
both = pytest.mark.parametrize("config", [CONFIG, FORWARD], ids=["steps", "forward"])


@pytest.fixture(scope="module")
def world() -> tuple[Model, Policy, Conditioner]:
    model = tiny_model()
    policy = make_policy(model.transformer, LoRAConfig(rank=4, alpha=4.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.parameters.items():
        if name.endswith("lora_B"):  # as in the middle of a run: policy and reference differ
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, policy, Conditioner(model)


def rolled(world: tuple[Model, Policy, Conditioner], config: GRPOConfig = CONFIG, seed: int = 5) -> Rollout:
    model, policy, conditioner = world
    return noised(policy, rollout(model, policy, conditioner, PROMPTS[: config.prompts], config, seed), config)


def steps_of(batch: Batch) -> list[Step]:
    return [term for term in batch.terms if isinstance(term, Step)]


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None}


def loss_gradients(
    world: tuple[Model, Policy, Conditioner], sampled: Rollout, advantages: Tensor, config: GRPOConfig = CONFIG
) -> dict[str, Tensor]:
    """Gradients of one update, read before the optimiser steps (a zero learning rate keeps the weights)."""
    policy = world[1]
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=0.0)
    grpo.update(policy, optimizer, sampled, advantages, dataclasses.replace(config, max_grad_norm=1e9))
    return gradients(policy)


def test_clipped_loss_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])
    # -2*1; the gain is capped at 1.2; a loss is never capped upwards; no credit below; the cap for a falling bad one
    expected = torch.tensor([-2.0, -2.4, 3.0, -1.0, 1.6])
    torch.testing.assert_close(grpo.clipped_loss(ratio, advantage, 0.2), expected)


def test_clipped_loss_has_no_gradient_beyond_the_clip() -> None:
    ratio = torch.tensor([1.5, 1.1, 0.5, 0.9], requires_grad=True)
    grpo.clipped_loss(ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2).sum().backward()
    assert ratio.grad is not None
    torch.testing.assert_close(ratio.grad, torch.tensor([0.0, -1.0, 0.0, 1.0]))


def test_kl_by_hand() -> None:
    mean, other = torch.zeros(1, 1, 2), torch.tensor([[[0.3, 0.1]]])
    assert grpo.kl_divergence(mean, other, 0.5).item() == pytest.approx((0.09 + 0.01) / 2 / (2 * 0.25))


def test_guarded_ratio_is_centred_where_the_plain_one_is_biased() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, std = torch.zeros(20_000, 1, 1), torch.full((20_000, 1, 1), 0.4), 0.5
    x = old + std * torch.randn(old.shape, generator=generator)
    log_ratio = ((x - old) ** 2 - (x - new) ** 2).flatten() / (2 * std**2)
    guarded = grpo.guarded_ratio(log_ratio, new, old, std).log() / std
    assert abs(guarded.mean().item()) < 0.02
    assert log_ratio.mean().item() == pytest.approx(-(0.4**2) / (2 * std**2), abs=0.02)


@both
def test_ratio_is_one_before_any_step(world: tuple[Model, Policy, Conditioner], config: GRPOConfig) -> None:
    config = dataclasses.replace(config, updates=2)  # so that the old log-probabilities are kept
    assert check_ratios(world[1], rolled(world, config), config) <= 1e-6  # draws are batched otherwise in a rollout


@pytest.mark.parametrize("step", ["cps", "flow_sde", "dance"])
def test_rollouts_repeat_to_the_bit_and_differ_by_seed(world: tuple[Model, Policy, Conditioner], step: str) -> None:
    config = dataclasses.replace(CONFIG, step=step)  # type: ignore[arg-type]
    first = rolled(world, config).latents()
    assert torch.equal(first, rolled(world, config).latents())
    assert not torch.allclose(first, rolled(world, config, seed=6).latents())


def test_shared_noise_differs_only_by_the_window(world: tuple[Model, Policy, Conditioner]) -> None:
    sampled = rolled(world, dataclasses.replace(CONFIG, shared_noise=True))
    for batch in sampled.batches:
        start = batch.terms[0].x_BNC.unflatten(0, (-1, CONFIG.group))
        end = steps_of(batch)[-1].x_next_BNC.unflatten(0, (-1, CONFIG.group))
        assert torch.allclose(start[:, 0], start[:, 1], atol=1e-5)
        assert (end[:, 0] - end[:, 1]).abs().amax() > 0.1


def test_every_update_has_images_when_all_prompts_are_as_long(world: tuple[Model, Policy, Conditioner]) -> None:
    model, policy, conditioner = world
    config = dataclasses.replace(FORWARD, prompts=4, updates=2)
    drawn = rollout(model, policy, conditioner, PROMPTS[:1] * 4, config, 0)
    parts = split(noised(policy, drawn, config), config.updates)
    assert [sum(len(batch.rows_B) for batch in part.batches) for part in parts] == [2 * config.group] * 2


@both
def test_only_the_images_that_are_kept_are_trained_on(
    world: tuple[Model, Policy, Conditioner], config: GRPOConfig
) -> None:
    model, policy, conditioner = world
    drawn = rollout(model, policy, conditioner, PROMPTS[:3], config, 5)
    kept, advantages = [1, 2, 5], torch.tensor([0.0, 1.0, -0.5, 0.0, 0.0, 2.0])
    part = noised(policy, drawn, config, torch.tensor([row in kept for row in range(6)]))
    assert sorted(row for batch in part.batches for row in batch.rows_B) == kept
    assert drawn.batches[0].terms == [] or config is CONFIG
    found = loss_gradients(world, part, advantages, config)
    whole = loss_gradients(world, noised(policy, drawn, config), advantages, config)
    for name in whole:  # those of advantage 0 add nothing but to the number of images
        torch.testing.assert_close(found[name], 2 * whole[name], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_steps_that_are_not_stochastic_are_of_second_order(world: tuple[Model, Policy, Conditioner]) -> None:
    model, policy, _ = world
    sampled = rolled(world, FORWARD)
    size = model.default_size
    s = sigmas(FORWARD.num_steps, math.prod(sampled.grid), model.scheduler.config, model.is_distilled)
    for batch in sampled.batches:
        x, slopes = initial_noise(model, [5 + row for row in batch.rows_B], size, size), []
        for i in range(FORWARD.num_steps):
            with policy.acting() as transformer:
                slopes.append(velocity(transformer, x, s[i], batch.text_BLD, sampled.grid))
            h = float(s[i + 1] - s[i])
            bend = (slopes[i] - slopes[i - 1]) / float(s[i] - s[i - 1]) if i else 0.0
            x = x + h * slopes[i] + h * h / 2 * bend
        torch.testing.assert_close(batch.final_BNC, x, atol=1e-5, rtol=1e-5)


def test_draws_share_noise_within_a_group_alone(world: tuple[Model, Policy, Conditioner]) -> None:
    sampled = rolled(world, FORWARD)
    width = FORWARD.max_sigma - FORWARD.min_sigma
    noise = torch.zeros(FORWARD.draws, 6, *sampled.latents().shape[1:])
    for batch in sampled.batches:
        for k, term in enumerate(batch.terms):
            assert isinstance(term, Draw) and k <= (term.sigma - FORWARD.min_sigma) / width * FORWARD.draws < k + 1
            noise[k, batch.rows_B] = term.target_BNC + batch.final_BNC
            noised = (1 - term.sigma) * batch.final_BNC + term.sigma * noise[k, batch.rows_B]
            torch.testing.assert_close(term.x_BNC, noised, atol=1e-5, rtol=1e-5)
    of_groups = noise.unflatten(1, (3, 2))
    torch.testing.assert_close(of_groups[:, :, 0], of_groups[:, :, 1], atol=1e-5, rtol=1e-5)
    assert (of_groups[:, 0, 0] - of_groups[:, 1, 0]).abs().mean() > 0.5
    assert (sampled.latents()[0] - sampled.latents()[1]).abs().mean() > 0.1  # their images differ all the same


@both
def test_equal_rewards_give_no_gradient(world: tuple[Model, Policy, Conditioner], config: GRPOConfig) -> None:
    for gradient in loss_gradients(world, rolled(world, config), torch.zeros(6), config).values():
        assert not gradient.any()


@both
def test_an_update_makes_what_was_good_likelier_and_what_was_bad_less_likely(config: GRPOConfig) -> None:
    config = dataclasses.replace(config, updates=2)
    model = tiny_model()
    policy = make_policy(model.transformer, LoRAConfig(rank=4, alpha=4.0), seed=0)
    sampled = rolled((model, policy, Conditioner(model)), config)
    advantages = torch.tensor([1.0, -1.0] * 3)
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=1e-3)
    grpo.update(policy, optimizer, sampled, advantages, config)
    gain = torch.zeros(6)
    for item in grpo.replay(policy, sampled, config):
        gain.index_add_(0, torch.tensor(item.rows_B), item.log_ratio_B.detach())
    assert (gain * advantages).sum() > 0


def test_gradient_is_that_of_a_slow_loop_from_the_papers(world: tuple[Model, Policy, Conditioner]) -> None:
    policy = world[1]
    config = dataclasses.replace(CONFIG, kl=0.1)
    sampled, advantages = rolled(world, config), torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    fast = loss_gradients(world, sampled, advantages, config)

    total = torch.zeros(())
    for batch in sampled.batches:
        for b, row in enumerate(batch.rows_B):
            for term in steps_of(batch):
                s, s_next = term.sigma, term.sigma_next
                x, x_next = term.x_BNC[b : b + 1], term.x_next_BNC[b : b + 1]
                args = x, torch.tensor(s), batch.text_BLD[b : b + 1], sampled.grid
                std = s_next * math.sin(config.eta * math.pi / 2)
                with policy.acting() as transformer:
                    v = velocity(transformer, *args)
                with policy.reference() as reference:
                    v_ref = velocity(reference, *args)
                mean, mean_ref = (
                    (1 - s_next) * (x - s * u) + math.sqrt(s_next**2 - std**2) * (x + (1 - s) * u) for u in (v, v_ref)
                )
                log_p = -((x_next - mean) ** 2 / (2 * std**2)).mean()
                ratio = (log_p - log_p.detach()).exp()  # the policy has not moved since the rollout
                surrogate = -torch.min(
                    advantages[row] * ratio, advantages[row] * ratio.clamp(1 - config.clip, 1 + config.clip)
                )
                total = total + surrogate + config.kl * ((mean - mean_ref) ** 2).mean() / (2 * std**2)
    policy_grads = torch.autograd.grad(total / 12, list(policy.parameters.values()))
    for name, slow in zip(policy.parameters, policy_grads, strict=True):
        torch.testing.assert_close(fast[name], slow, rtol=1e-3, atol=1e-6)


def test_forward_gradient_is_that_of_a_slow_loop_from_the_paper(world: tuple[Model, Policy, Conditioner]) -> None:
    policy = world[1]
    config = dataclasses.replace(FORWARD, kl=0.1, hold=0.2, reference_guidance=2.0)
    sampled, advantages = rolled(world, config), torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    (empty,) = world[2].encode([""])
    fast = loss_gradients(world, sampled, advantages, config)

    total = torch.zeros(())
    for batch in sampled.batches:
        for b, row in enumerate(batch.rows_B):
            for term in batch.terms:
                if b not in term.rows:
                    continue
                x0, x, s = batch.final_BNC[b : b + 1], term.x_BNC[term.rows.index(b)][None], term.sigma
                eps = (x - (1 - s) * x0) / s
                args = x, torch.tensor(s), batch.text_BLD[b : b + 1], sampled.grid
                with policy.acting() as transformer:
                    v = velocity(transformer, *args)
                with policy.reference() as reference:
                    conditional = velocity(reference, *args)
                    unconditional = velocity(reference, *args[:2], empty[None], sampled.grid)
                if s < config.min_sigma:
                    share = len(term.rows) / len(batch.rows_B)
                    total = total + config.hold * ((v - conditional) ** 2).mean() / share
                    continue
                v_ref = 3 * conditional - 2 * unconditional
                # on policy, the gradient of -A exp(log p - log p_old) is that of A |v - u|^2, here about v_ref
                weighted = advantages[row] * (2 * (v_ref - (eps - x0)) * v).mean()
                total = total + weighted + config.kl * ((v - v_ref) ** 2).mean()
    assert all(sum(term.sigma < config.min_sigma for term in batch.terms) == 1 for batch in sampled.batches)
    policy_grads = torch.autograd.grad(total / 18, list(policy.parameters.values()))
    for name, slow in zip(policy.parameters, policy_grads, strict=True):
        torch.testing.assert_close(fast[name], slow, rtol=2e-3, atol=1e-5)


def test_what_is_held_is_drawn_towards_the_reference_whatever_the_advantages(
    world: tuple[Model, Policy, Conditioner]
) -> None:
    config = dataclasses.replace(FORWARD, hold=0.3)
    sampled = rolled(world, config)
    assert len(rolled(world, dataclasses.replace(config, hold=0.0)).batches[0].terms) == config.draws
    below = dataclasses.replace(sampled, batches=[
        dataclasses.replace(batch, terms=[term for term in batch.terms if term.sigma < config.min_sigma])
        for batch in sampled.batches
    ])  # fmt: skip
    good, bad = (loss_gradients(world, below, scale * torch.arange(6.0), config) for scale in (1, -1))
    assert all(torch.equal(good[name], bad[name]) for name in good)
    for item in grpo.replay(world[1], below, config):
        loss_B, _ = grpo.term_loss(item, torch.ones(len(item.rows_B)), config)
        assert item.kl_B is not None and (item.kl_B > 0).all()
        torch.testing.assert_close(loss_B, 0.3 * item.kl_B)


def test_of_a_batch_a_quarter_is_held_and_stands_for_all(world: tuple[Model, Policy, Conditioner]) -> None:
    sampled = rolled(world, dataclasses.replace(FORWARD, hold=0.3, group=6))
    for batch in sampled.batches:
        held = [draws for draws in together(batch, 7) if (draws.sigma_B < FORWARD.min_sigma).any()]
        rows = [row for d in held for row, s in zip(d.rows_B, d.sigma_B.tolist(), strict=True) if s < FORWARD.min_sigma]
        assert rows == batch.rows_B[::4]
        parts = list(together(batch, 7))
        assert max(len(draws.rows_B) for draws in parts) <= 7
        total = sum(float(draws.weight_B.sum()) for draws in parts)
        assert total == pytest.approx(len(batch.rows_B) * (FORWARD.draws + 1))


@both
def test_gradient_does_not_depend_on_the_batch_split(
    world: tuple[Model, Policy, Conditioner], config: GRPOConfig
) -> None:
    def part(value: object, b: int) -> object:
        return value[b : b + 1] if isinstance(value, Tensor) else value

    def cut(term: Step | Draw, b: int) -> Step | Draw:
        whole = {"rows": range(1)} if isinstance(term, Draw) else {}
        fields = {f.name: part(getattr(term, f.name), b) for f in dataclasses.fields(term)}
        return dataclasses.replace(term, **fields | whole)

    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    whole = rolled(world, config)
    split = dataclasses.replace(whole, batches=[
        Batch(rows_B=[row], text_BLD=batch.text_BLD[b : b + 1], terms=[cut(term, b) for term in batch.terms],
              final_BNC=batch.final_BNC[b : b + 1])
        for batch in whole.batches for b, row in enumerate(batch.rows_B)
    ])  # fmt: skip
    one, other = loss_gradients(world, whole, advantages, config), loss_gradients(world, split, advantages, config)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_the_loss_about_a_reference_is_least_where_diffusion_nft_ends() -> None:
    """Two images of advantage 1 and -1 and one noise level, with the velocity itself as what is learnt."""
    target, v_ref = torch.randn(2, 4, 3), torch.randn(1, 4, 3).expand(2, -1, -1)
    advantage, kl = torch.tensor([1.0, -1.0]), 0.5
    v = torch.zeros(1, 4, 3, requires_grad=True)
    for _ in range(50):
        seen = v.expand(2, -1, -1)
        loss = -(advantage * forward_logp(seen, target, v_ref)).mean() - kl * forward_logp(seen, v_ref).mean()
        (gradient,) = torch.autograd.grad(loss, v)
        v = (v - 10 * gradient).detach().requires_grad_()
    best = v_ref[:1] + (advantage[:, None, None] * (target - v_ref)).mean(0) / kl
    torch.testing.assert_close(v.detach(), best)


def test_first_order_likelihood_touches_the_exact_one() -> None:
    target, around, direction = torch.randn(3, 2, 4, 3).unbind()
    v = around.clone().requires_grad_()
    exact, first = forward_logp(v, target), forward_logp(v, target, around)
    torch.testing.assert_close(exact, first)
    for one, other in zip(torch.autograd.grad(exact.sum(), v), torch.autograd.grad(first.sum(), v), strict=True):
        torch.testing.assert_close(one, other)
    moved = forward_logp(around + 2 * direction, target, around) - first
    torch.testing.assert_close(moved, 2 * (forward_logp(around + direction, target, around) - first))


def test_latents_come_back_in_prompt_order(world: tuple[Model, Policy, Conditioner]) -> None:
    sampled = rolled(world)
    latents = sampled.latents()
    for batch in sampled.batches:
        for b, row in enumerate(batch.rows_B):
            assert torch.equal(latents[row], batch.final_BNC[b])


def test_log_probability_of_a_rollout_is_that_of_its_step(world: tuple[Model, Policy, Conditioner]) -> None:
    sampled = rolled(world)
    batch = sampled.batches[0]
    term = steps_of(batch)[0]
    with torch.no_grad(), world[1].acting() as transformer:
        v = velocity(transformer, term.x_BNC, torch.tensor(term.sigma), batch.text_BLD, sampled.grid)
    step = cps_step(
        term.x_BNC, v, term.sigma, term.sigma_next, CONFIG.eta, x_next=term.x_next_BNC, sigma_max=sampled.sigma_max
    )
    torch.testing.assert_close(step.logp_B, term.logp_B)


def test_preflight_refuses_ratios_beyond_the_clip(world: tuple[Model, Policy, Conditioner]) -> None:
    sampled = rolled(world)
    shifted = [
        dataclasses.replace(b, terms=[dataclasses.replace(t, logp_B=t.logp_B + 0.01) for t in steps_of(b)])
        for b in sampled.batches
    ]
    with pytest.raises(RunStopped, match=r"ratio - 1\| = 0.00995.*clip range is 0.001") as stopped:
        check_ratios(world[1], dataclasses.replace(sampled, batches=shifted), CONFIG)
    assert stopped.value.exit_code == 3


def test_a_gradient_that_is_not_finite_stops_before_the_step(world: tuple[Model, Policy, Conditioner]) -> None:
    policy = world[1]
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=1.0)
    with pytest.raises(FloatingPointError, match="no step was taken"):
        grpo.update(policy, optimizer, rolled(world), torch.tensor([math.nan, 1, 1, 1, 1, 1]), CONFIG)
    assert all(torch.equal(before[n], p) for n, p in policy.parameters.items())


def test_full_fine_tuning_starts_at_its_reference_and_leaves_it() -> None:
    model = tiny_model()
    policy = make_policy(model.transformer, None, seed=0)
    config = dataclasses.replace(CONFIG, kl=0.1)
    world = model, policy, Conditioner(model)
    sampled = rolled(world, config)
    assert check_ratios(policy, sampled, config) == 0.0
    optimizer = torch.optim.AdamW(list(policy.parameters.values()), lr=1e-3)
    first = grpo.update(policy, optimizer, sampled, torch.tensor([1.0, -1.0] * 3), config)
    second = grpo.update(policy, optimizer, rolled(world, config), torch.tensor([1.0, -1.0] * 3), config)
    assert first["kl"] == 0.0 and second["kl"] > 0.0


@pytest.mark.parametrize(
    ("field", "value"), [("group", 1), ("window", 10), ("clip", 0.0), ("ema", 1.0), ("updates", 9), ("kl", -1.0),
                         ("draws", 0), ("max_sigma", 1.5), ("min_sigma", 0.95), ("reference_guidance", -1.0)]
)
def test_settings_that_cannot_work_are_refused(field: str, value: float) -> None:
    with pytest.raises(RlhfImgError, match=f"grpo.{field}"):
        GRPOConfig(**{field: value})  # type: ignore[arg-type]
