"""TDM: its mathematics against closed forms, its roles apart from each other, and runs end to end."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import PROMPTS, tiny_model
from torch import Tensor, nn

from rlhf_img.algorithms import tdm
from rlhf_img.algorithms.tdm import CRITIC_TARGETS, Landing, Stages, TDMConfig
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import euler_step
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.lora import add_role, role, role_parameters
from rlhf_img.model.policy import POLICY, LoRAConfig, Policy, make_role

CONFIG = TDMConfig(prompts=4, images=2, num_steps=4, critic_updates=1, lr=1e-2, critic_lr=1e-2)
KREA = torch.tensor([1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0])  # 8 steps at mu = 1.15


def in_stage(index: int, share: float, count: int) -> Stages:
    start, end = KREA[index].expand(count), KREA[index + 1].expand(count)
    return Stages(index_B=torch.full((count,), index), start_B=start, end_B=end, tau_B=end + share * (start - end))


def gaussian_nodes() -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of independent standard normals and their probabilities: means of up to ninth powers are exact."""
    x, p = np.polynomial.hermite_e.hermegauss(5)
    z, n = np.meshgrid(x, x)
    weights = np.outer(p, p) / p.sum() ** 2
    return tuple(torch.tensor(a.flatten(), dtype=torch.float32) for a in (z, n, weights))  # type: ignore[return-value]


def gaussian_velocity(x: Tensor, mean: float, variance: float, tau: float) -> Tensor:
    """eps - x0 at x for a law of x_tau that is N(mean, variance): -(x + tau score) / (1 - tau)."""
    return -(x - tau * (x - mean) / variance) / (1 - tau)


def regressed(x: Tensor, target: Tensor, weights: Tensor) -> tuple[float, float]:
    """The line through the target: for jointly Gaussian x and target, its conditional expectation."""
    mean_x, mean_y = (weights * x).sum(), (weights * target).sum()
    slope = (weights * (x - mean_x) * (target - mean_y)).sum() / (weights * (x - mean_x) ** 2).sum()
    return float(slope), float(mean_y - slope * mean_x)


def critic_of(name: str, stages: Stages) -> tuple[Tensor, tuple[float, float], tuple[float, float]]:
    """For a student whose x_s is N(0.3, 0.7^2), with x0 a function of it: x_tau, what a perfect critic learns as slope
    and offset, and the velocity of x_s noised to tau as the same."""
    z, n, weights = gaussian_nodes()
    x_s, x0 = 0.3 + 0.7 * z, 0.5 - 0.4 * z
    shape = (-1, 1, 1)
    noised = CRITIC_TARGETS[name](Landing(x_BNC=x_s.view(shape), x0_BNC=x0.view(shape)), stages, n.view(shape))
    s, tau = float(stages.end_B[0]), float(stages.tau_B[0])
    a = (1 - tau) / (1 - s)
    b2 = tau**2 - a**2 * s**2
    zero, one = (float(gaussian_velocity(torch.tensor(x), a * 0.3, a**2 * 0.49 + b2, tau)) for x in (0.0, 1.0))
    return noised.x_BNC.flatten(), regressed(noised.x_BNC.flatten(), noised.target_BNC.flatten(), weights), (
        one - zero, zero
    )  # fmt: skip


def test_renoising_keeps_the_flow_and_composes() -> None:
    s, t, u = (torch.tensor([x], dtype=torch.float64) for x in (0.3109, 0.4, 0.5128))
    for low, high in ((s, t), (t, u), (torch.zeros_like(s), u), (torch.tensor([0.9567]), torch.tensor([0.957]))):
        a, b = tdm.renoise_coefficients(low, high)
        torch.testing.assert_close(a * (1 - low), 1 - high)  # the mean, given x0
        torch.testing.assert_close(a**2 * low**2 + b**2, high**2)  # the variance, given x0
        identity = (high + (1 - high) * low**2 / (1 - low) ** 2) / b
        torch.testing.assert_close((high / b - b) / (1 - high), identity, rtol=1e-3, atol=1e-6)
    (a1, b1), (a2, b2), (a, b) = (tdm.renoise_coefficients(*pair) for pair in ((s, t), (t, u), (s, u)))
    torch.testing.assert_close(a1 * a2, a)
    torch.testing.assert_close(a2**2 * b1**2 + b2**2, b**2)


@pytest.mark.parametrize("index", range(8))
def test_only_the_ambient_target_is_unbiased_for_what_the_student_lands_on(index: int) -> None:
    stages = in_stage(index, 0.5, 25)
    tolerance = {"rel": 2e-3, "abs": 2e-3}
    _, ambient, truth = critic_of("ambient", stages)
    assert ambient == pytest.approx(truth, **tolerance)
    _, x0, _ = critic_of("tdm_x0", stages)
    if index == 7:  # it lands on x0 itself: nothing to tell apart, had x_s been x0 here
        return
    assert max(abs(x0[0] - truth[0]), abs(x0[1] - truth[1])) > 0.05
    x, dmd, _ = critic_of("dmd", stages)
    tau = float(stages.tau_B[0])
    mean, variance = (1 - tau) * 0.5, (1 - tau) ** 2 * 0.16 + tau**2  # of x0 noised to tau
    of_x0 = [float(gaussian_velocity(torch.tensor(v), mean, variance, tau)) for v in (0.0, 1.0)]
    assert dmd == pytest.approx((of_x0[1] - of_x0[0], of_x0[0]), **tolerance)


def test_at_the_last_stage_all_targets_are_flow_matching() -> None:
    stages = in_stage(7, 0.4, 3)
    x0, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    for name, target in CRITIC_TARGETS.items():
        noised = target(Landing(x_BNC=x0, x0_BNC=x0), stages, noise)
        torch.testing.assert_close(noised.target_BNC, noise - x0, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(noised.x_BNC, torch.lerp(x0, noise, float(stages.tau_B[0])), msg=name)


@pytest.mark.parametrize("index", range(8))
def test_weight_is_the_inverse_variance_of_the_target_for_data_of_variance_one(index: int) -> None:
    stages = in_stage(index, 0.5, 25)
    z, n, weights = gaussian_nodes()
    s = float(stages.end_B[0])
    x_s = math.sqrt((1 - s) ** 2 + s**2) * z
    noised = tdm.ambient(Landing(x_BNC=x_s.view(-1, 1, 1), x0_BNC=x_s.view(-1, 1, 1)), stages, n.view(-1, 1, 1))
    x, target = noised.x_BNC.flatten(), noised.target_BNC.flatten()
    slope, offset = regressed(x, target, weights)
    left = float((weights * (target - slope * x - offset) ** 2).sum())
    assert float(noised.weight_B[0]) * left == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("index", range(8))
def test_the_gap_of_two_gaussians_points_to_the_teacher(index: int) -> None:
    """Student and teacher land on N(m, 0.7^2) and N(0, 0.7^2): E[DM] is -m times a known factor; 0 where m is."""
    stages = in_stage(index, 0.5, 25)
    z, n, weights = gaussian_nodes()
    s, tau = float(stages.end_B[0]), float(stages.tau_B[0])
    a, b = (float(c[0]) for c in tdm.renoise_coefficients(stages.end_B, stages.tau_B))
    variance = a**2 * 0.49 + b**2
    for m in (0.0, 0.5):
        x = (a * (m + 0.7 * z) + b * n).view(-1, 1, 1)
        v_critic, v_teacher = gaussian_velocity(x, a * m, variance, tau), gaussian_velocity(x, 0.0, variance, tau)
        x0 = torch.zeros_like(x).requires_grad_()
        config = dataclasses.replace(CONFIG, guidance=0.0, norm_floor=1e6)  # a constant normaliser: gradients add up
        loss, metrics = tdm.student_loss(x0, x, stages.tau_B, v_teacher, v_teacher, v_critic, config)
        (gradient,) = torch.autograd.grad(loss.sum(), x0)
        factor = tau**2 * a / ((1 - tau) * variance)
        mean = float((weights * gradient.flatten()).sum()) * 1e6 / -2
        assert mean == pytest.approx(-m * factor, rel=1e-3, abs=1e-5), s
        assert (float(metrics["dm"].max()) == 0) == (m == 0) and not metrics["guidance"].any()


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_surrogate_gradient_is_the_formula(loss: str) -> None:
    config = dataclasses.replace(CONFIG, loss=loss, guidance=1.5, huber_c=0.3)  # type: ignore[arg-type]
    x0, x_tau, teacher, empty, critic = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0)).unbind()
    tau = torch.tensor([0.98, 0.6, 0.1])
    x0.requires_grad_()
    value, metrics = tdm.student_loss(x0, x_tau, tau, teacher, empty, critic, config)
    (gradient,) = torch.autograd.grad(value.sum(), x0)
    for b in range(3):
        x0_teacher, x0_empty, x0_critic = (x_tau[b] - tau[b] * v[b] for v in (teacher, empty, critic))
        dm, ca = x0_teacher - x0_critic, 1.5 * (x0_teacher - x0_empty)
        norm = (x0[b] - (2.5 * x0_teacher - 1.5 * x0_empty)).abs().mean()  # w = 1 + g
        pull = dm + ca
        slope = 2 * pull if loss == "mse" else pull / (pull**2 + 0.09).sqrt()
        torch.testing.assert_close(gradient[b], -slope / (8 * norm))
        torch.testing.assert_close(metrics["dm"][b], dm.square().mean().sqrt())
        torch.testing.assert_close(metrics["guidance"][b], ca.square().mean().sqrt())


def test_stages_fill_their_grid_without_overlap() -> None:
    stages = tdm.draw_stages(KREA, 20_000, 0.1, torch.Generator().manual_seed(0))
    share = (stages.tau_B - stages.end_B) / (stages.start_B - stages.end_B)
    assert float(share.min()) > 0.099 and float(share.max()) < 0.901
    assert torch.equal(stages.start_B, KREA[stages.index_B]) and torch.equal(stages.end_B, KREA[stages.index_B + 1])
    counts = torch.bincount(stages.index_B, minlength=8) / 20_000
    torch.testing.assert_close(counts, torch.full((8,), 1 / 8), atol=0.01, rtol=0)


def test_the_grid_is_that_of_the_stock_pipeline_for_a_distilled_model() -> None:
    torch.testing.assert_close(tdm.student_grid(tiny_model(), 8), KREA, atol=1e-4, rtol=0)
