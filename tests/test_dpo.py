"""Preference optimisation: its losses by hand, its gradients against the papers, and what STPO promises."""

import dataclasses
import math

import pytest
import torch
from tiny import PROMPTS, tiny_model
from torch import Tensor

from rlhf_img.algorithms import dpo
from rlhf_img.algorithms.dpo import METHODS, DPOConfig, NoisedPairs, PairErrors
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.forward import by_length, velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import LoRAConfig, Policy, make_policy

CONFIG = DPOConfig(max_grad_norm=1e9)
BETA = 200.0
World = tuple[Model, Policy, list[NoisedPairs]]
every_loss = pytest.mark.parametrize("name", METHODS)


def fresh(apart: float = 0.05, identical: bool = False) -> World:
    """A policy that has moved from its reference, and eight noised pairs of four prompts."""
    model = tiny_model()
    policy = make_policy(model.transformer, LoRAConfig(rank=4, alpha=4.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.parameters.items():
        if name.endswith("lora_B"):
            parameter.data = apart * torch.randn(parameter.shape, generator=generator)
    batches = []
    for rows, text_BLD in by_length(Conditioner(model).encode(PROMPTS * 2)):
        shape = (len(rows), 4, 64)
        winner, loser, noise = (torch.randn(shape, generator=generator) for _ in range(3))
        sigma = 0.3 + 0.5 * torch.rand(len(rows), generator=generator)
        batches.append(dpo.noised(winner, winner if identical else loser, text_BLD, sigma, noise, (2, 2)))
    return model, policy, batches


@pytest.fixture(scope="module")
def world() -> World:
    return fresh()


def errors_of(**given: float) -> PairErrors:
    names = PairErrors.__dataclass_fields__
    return PairErrors(**{name: torch.tensor([given.get(name.removesuffix("_B"), 1.0)]) for name in names})


def step_gradients(world: World, name: str, config: DPOConfig = CONFIG) -> dict[str, Tensor]:
    """What one update hands to the optimiser (a zero learning rate keeps the weights)."""
    _, policy, batches = world
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=0.0)
    dpo.update(policy, optimizer, batches, BETA, config, METHODS[name])
    return {n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None}


def test_losses_by_hand() -> None:
    errors = errors_of(winner=1.2, winner_ref=1.0, loser=1.5, loser_ref=1.0, loser_drift=0.1, winner_drift=0.3)
    # the winner rose by 0.2 and the loser by 0.5: the margin is 0.3
    config = DPOConfig(anchor=2.0, curvature=3.0)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    assert errors.margin_B.item() == pytest.approx(0.3) and errors.rise_B.item() == pytest.approx(0.2)
    assert dpo.dpo_loss(errors, 10.0, config).item() == pytest.approx(softplus(-1.5))
    assert dpo.ipo_loss(errors, 10.0, config).item() == pytest.approx(1.0)
    assert dpo.anchored_loss(errors, 10.0, config).item() == pytest.approx(softplus(-5 * (0.3 - 0.4)))
    assert dpo.mirrored_loss(errors, 10.0, config).item() == pytest.approx(softplus(-5 * (0.3 - 0.4)))


@pytest.mark.parametrize(("name", "start"), [(n, 0.25 if n == "ipo" else math.log(2)) for n in METHODS])
def test_at_the_reference_every_loss_is_the_undecided_one(name: str, start: float) -> None:
    _, policy, batches = fresh(apart=0.0)
    _, _, loss_B, errors = dpo.gradients(policy, batches[0], METHODS[name], BETA, CONFIG)
    assert not errors.margin_B.any() and not errors.loser_drift_B.any()
    torch.testing.assert_close(loss_B, torch.full_like(loss_B, start))


def test_at_the_reference_the_candidates_have_the_gradient_of_dpo() -> None:
    world = fresh(apart=0.0)
    expected = step_gradients(world, "dpo")
    for name in ("stpo-anchor", "stpo-guard", "stpo-mirror"):
        for n, gradient in step_gradients(world, name).items():
            torch.testing.assert_close(gradient, expected[n], rtol=1e-4, atol=1e-6)


@every_loss
def test_a_step_moves_towards_the_winner_and_away_from_the_loser(name: str) -> None:
    _, policy, batches = fresh(apart=0.0)
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=1e-4)
    before = dpo.measure(policy, batches, CONFIG).margin_B.mean()
    dpo.update(policy, optimizer, batches, BETA, CONFIG, METHODS[name])
    assert dpo.measure(policy, batches, CONFIG).margin_B.mean() > before
    errors = errors_of()
    sides = {side: torch.ones(1, requires_grad=True) for side in ("winner_B", "loser_B")}
    loss_B = METHODS[name].loss(dataclasses.replace(errors, **sides), BETA, CONFIG)
    to_winner, to_loser = torch.autograd.grad(loss_B.sum(), list(sides.values()))
    assert to_winner > 0 > to_loser  # lower the winner's error, raise the loser's
    torch.testing.assert_close(to_winner, -to_loser)


@pytest.mark.parametrize("name", ["dpo", "ipo", "stpo-guard"])
def test_an_identical_pair_gives_no_gradient(name: str) -> None:
    for gradient in step_gradients(fresh(identical=True), name).values():
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=2e-5)


def test_an_identical_pair_pulls_the_candidates_back_to_the_reference_alone() -> None:
    _, policy, batches = world = fresh(identical=True)
    step_gradients(world, "stpo-mirror")
    before = dpo.measure(policy, batches, CONFIG).loser_drift_B.mean()
    torch.optim.SGD(list(policy.parameters.values()), lr=1e-4).step()
    assert dpo.measure(policy, batches, CONFIG).loser_drift_B.mean() < before


def test_swapped_pairs_swap_the_margin_and_a_common_shift_leaves_it(world: World) -> None:
    _, policy, batches = world
    errors = dpo.measure(policy, batches, CONFIG)
    swapped = [
        dataclasses.replace(
            b, winner_BNC=b.loser_BNC, loser_BNC=b.winner_BNC, winner_target_BNC=b.loser_target_BNC,
            loser_target_BNC=b.winner_target_BNC,
        )
        for b in batches
    ]  # fmt: skip
    torch.testing.assert_close(dpo.measure(policy, swapped, CONFIG).margin_B, -errors.margin_B)
    shifted = dataclasses.replace(errors, winner_B=errors.winner_B + 0.1, loser_B=errors.loser_B + 0.1)
    torch.testing.assert_close(dpo.dpo_loss(shifted, BETA, CONFIG), dpo.dpo_loss(errors, BETA, CONFIG),
                               rtol=1e-4, atol=1e-4)


@every_loss
def test_gradient_does_not_depend_on_the_batch_split(world: World, name: str) -> None:
    whole = step_gradients(world, name)
    for n, gradient in step_gradients(world, name, dataclasses.replace(CONFIG, batch_size=2)).items():
        torch.testing.assert_close(gradient, whole[n], rtol=1e-3, atol=1e-4 * float(whole[n].abs().max()))


@pytest.mark.parametrize("name", ["dpo", "ipo", "stpo-anchor", "stpo-mirror"])
def test_gradient_is_that_of_a_slow_loop_from_the_formulas(world: World, name: str) -> None:
    _, policy, batches = world
    config = dataclasses.replace(CONFIG, anchor=0.7, curvature=1.0)
    fast = step_gradients(world, name, config)
    total, count = torch.zeros(()), 0
    for b in batches:
        for i in range(len(b.sigma_B)):
            changes, mirrored = [], torch.zeros(())
            for x, u in ((b.winner_BNC, b.winner_target_BNC), (b.loser_BNC, b.loser_target_BNC)):
                args = x[i : i + 1], b.sigma_B[i], b.text_BLD[i : i + 1], b.grid
                with policy.acting() as transformer:
                    v = velocity(transformer, *args)
                with policy.reference() as reference:
                    v_ref = velocity(reference, *args)
                changes.append(((v - u[i]) ** 2).mean() - ((v_ref - u[i]) ** 2).mean())
                # of the loser, at last: its velocity's mirror image against its target
                mirrored = ((2 * v_ref - v - u[i]) ** 2).mean() - ((v_ref - u[i]) ** 2).mean()
            winner, loser = changes
            z = BETA / 2 * (loser - winner)
            total = total + {
                "dpo": -torch.log(torch.sigmoid(z)),
                "ipo": (z - 0.5) ** 2,
                "stpo-anchor": -torch.log(torch.sigmoid(z - BETA / 2 * 0.7 * winner.clamp_min(0))),
                "stpo-mirror": -torch.log(torch.sigmoid(-BETA / 2 * (winner + mirrored))),
            }[name]
            count += 1
    slow = torch.autograd.grad(total / count, list(policy.parameters.values()))
    for n, gradient in zip(policy.parameters, slow, strict=True):
        torch.testing.assert_close(fast[n], gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()))


def test_the_guard_keeps_the_winners_error_from_rising_where_dpo_raises_it() -> None:
    """Two losers weigh more than one winner and lie the same way, so that plain DPO pays with the winner."""
    winner, loser = [torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 1.0])]
    scale = dpo.guard_scale(winner, loser)
    assert scale == pytest.approx(1 / 3)
    step = -(winner[0] + scale * loser[0])
    assert float((winner[0] * step).sum()) == pytest.approx(0.0, abs=1e-6)
    assert dpo.guard_scale(winner, [torch.tensor([3.0, 1.0])]) == 1.0  # they agree
    assert dpo.guard_scale(winner, [torch.tensor([-0.5, 1.0])]) == 1.0  # and here the winner still gains


def test_a_guarded_step_does_not_raise_the_winners_error_to_first_order() -> None:
    """Winners that the policy fits almost exactly, and losers beyond them in about the same direction."""
    _, policy, batches = fresh(apart=0.3)
    generator = torch.Generator().manual_seed(1)
    hard = []
    for b in batches:
        with torch.no_grad(), policy.acting() as transformer:
            v = velocity(transformer, b.winner_BNC, b.sigma_B, b.text_BLD, b.grid)
        residual, other = (0.05 * torch.randn(v.shape, generator=generator) for _ in range(2))
        near, far = v + residual, v + 20 * residual + 5 * other
        hard.append(dataclasses.replace(b, winner_target_BNC=near, loser_BNC=b.winner_BNC, loser_target_BNC=far))

    def change(name: str, lr: float) -> float:
        kept = {n: p.detach().clone() for n, p in policy.parameters.items()}
        before = dpo.measure(policy, hard, CONFIG).winner_B.double().mean()
        optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=lr)
        dpo.update(policy, optimizer, hard, 1e-3, CONFIG, METHODS[name])  # so small that all pairs weigh alike
        after = dpo.measure(policy, hard, CONFIG).winner_B.double().mean()
        for n, p in policy.parameters.items():
            p.data.copy_(kept[n])
        return float((after - before) / lr)

    assert change("dpo", 10.0) > 0
    assert abs(change("stpo-guard", 10.0)) < 0.1 * change("dpo", 10.0)


def test_the_mirrored_loser_has_a_target_where_dpo_has_none() -> None:
    """The velocity of one loser as what is learnt: DPO's best is at infinity, the mirror's at v_ref + (v_ref - u)."""
    u, v_ref = torch.randn(1, 4, 3), torch.randn(1, 4, 3)

    def margin(v: Tensor, weight: float) -> Tensor:
        return (v - u).square().mean() - (v_ref - u).square().mean() - weight * (v - v_ref).square().mean()

    for curvature in (1.0, 4.0):
        best = (v_ref + (v_ref - u) / curvature).requires_grad_()
        (gradient,) = torch.autograd.grad(margin(best, 1 + curvature), best)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
        bound = (v_ref - u).square().mean() / curvature
        torch.testing.assert_close(margin(best, 1 + curvature).detach(), bound)
    far = [margin(v_ref + scale * (v_ref - u), 0.0) for scale in (1.0, 10.0, 100.0)]
    assert far[0] < far[1] < far[2]


def test_the_anchor_weighs_the_winner_more_once_it_is_worse_than_under_the_reference() -> None:
    def pull(winner: float) -> float:
        leaf = torch.tensor([winner], requires_grad=True)
        errors = dataclasses.replace(errors_of(loser=winner), winner_B=leaf)  # margin 0: the same slope in both
        config = dataclasses.replace(CONFIG, anchor=3.0)
        (gradient,) = torch.autograd.grad(dpo.anchored_loss(errors, 1e-6, config).sum(), leaf)
        return gradient.item() / 1e-6

    assert pull(0.9) == pytest.approx(0.25, rel=1e-4)
    assert pull(1.1) == pytest.approx(0.25 * 4, rel=1e-4)


def test_beta_is_measured_so_that_a_typical_pair_is_decided_at_the_drift_that_is_wanted() -> None:
    _, policy, batches = fresh(apart=0.0)
    config = dataclasses.replace(CONFIG, lr=1e-3, calibration_logit=1.5)
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    beta = dpo.calibrated_beta(policy, [batches] * 3, batches, config)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in policy.parameters.items())
    assert dpo.calibrated_beta(policy, [batches] * 3, batches, config) == beta
    optimizer = torch.optim.AdamW(list(policy.parameters.values()), lr=1e-3, weight_decay=config.weight_decay)
    for _ in range(3):  # a beta near 0 is what the trial stands for
        dpo.update(policy, optimizer, batches, 1e-3, config, METHODS["dpo"])
    errors = dpo.measure(policy, batches, config)
    drift = (errors.winner_drift_B + errors.loser_drift_B).mean() / (errors.winner_ref_B + errors.loser_ref_B).mean()
    logits = beta / 2 * errors.margin_B * (config.calibration_drift / drift).sqrt()
    assert logits.square().mean().sqrt().item() == pytest.approx(1.5, rel=0.01)


def test_measured_beta_hardly_depends_on_the_trials_steps() -> None:
    _, policy, batches = fresh(apart=0.0)
    betas = [
        dpo.calibrated_beta(policy, [batches] * steps, batches, dataclasses.replace(CONFIG, lr=lr))
        for steps, lr in ((2, 3e-4), (2, 3e-3), (4, 1e-3))
    ]
    assert max(betas) < 1.5 * min(betas), betas


def test_metrics_say_what_happened_to_both_images() -> None:
    errors = errors_of(winner=1.1, loser=1.4, loser_ref=2.0, winner_drift=0.2, loser_drift=0.4)
    means = dpo.with_rises(dpo.describe(errors, 4.0))
    assert means["pairs/winner_rise"] == pytest.approx(0.1) and means["pairs/loser_rise"] == pytest.approx(-0.3)
    assert means["pairs/margin"] == pytest.approx(-0.7) and means["pairs/accuracy"] == 0.0
    assert means["pairs/drift"] == pytest.approx(0.3)
    assert means["pairs/decided"] == pytest.approx(1 / (1 + math.exp(1.4)))
    assert dpo.describe(errors_of(), 4.0)["pairs/accuracy"] == 0.5  # nothing said


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    _, policy, batches = fresh()
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=1.0)
    with pytest.raises(FloatingPointError, match="no step was taken"):
        dpo.update(policy, optimizer, batches, math.nan, CONFIG)
    assert all(torch.equal(before[n], p) for n, p in policy.parameters.items())


@pytest.mark.parametrize(
    ("field", "value"), [("beta_mean", 0.0), ("pairs", 0), ("draws", 0), ("batch_size", 1), ("lr", 0.0), ("ema", 1.0),
                         ("anchor", -1.0), ("curvature", -1.0), ("max_sigma", 1.5), ("min_sigma", 0.95)]
)
def test_settings_that_cannot_work_are_refused(field: str, value: float) -> None:
    with pytest.raises(RlhfImgError, match=f"dpo.{field}"):
        DPOConfig(**{field: value})  # type: ignore[arg-type]
