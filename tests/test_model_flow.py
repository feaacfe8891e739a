"""Flow mathematics: schedules against diffusers, steps against hand-worked values and an analytic Gaussian."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.flow import STEPS, cps_step, dance_sde_step, euler_step, flow_sde_step, second_order, sigmas

KREA = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 6400, "time_shift_type": "exponential",
}  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 8, 28, 52])
@pytest.mark.parametrize("tokens", [16, 256, 4096, 6400])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("changes", [{}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False, "shift": 3.0}])
def test_sigmas_equal_diffusers(steps: int, tokens: int, distilled: bool, changes: dict[str, object]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**{**KREA, **changes})
    mu = 1.15 if distilled else calculate_shift(tokens, 256, 6400, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # as the stock pipeline calls it
    ours = sigmas(steps, tokens, scheduler.config, distilled)
    assert ours.dtype == torch.float32 and ours[-1] == 0
    assert torch.equal(ours, scheduler.sigmas)  # a rounding difference is a thousand times larger in the time embedding


def test_sigmas_by_hand() -> None:
    # 2 steps: s = 1 and 1/2. Distilled: e^1.15 / (e^1.15 + 1/s - 1) at s = 1/2.
    e = math.exp(1.15)
    assert sigmas(2, 16, KREA, True).tolist() == pytest.approx([1.0, e / (e + 1), 0.0])
    # 256 tokens are the base: mu is 0.5.
    e = math.exp(0.5)
    assert sigmas(4, 256, KREA, False).tolist() == pytest.approx(
        [1.0, 3 * e / (3 * e + 1), e / (e + 1), e / (e + 3), 0.0]
    )


def test_sigmas_refuses_what_krea_does_not_use() -> None:
    with pytest.raises(RlhfImgError, match="at least 1; got 0"):
        sigmas(0, 16, KREA, False)
    with pytest.raises(RlhfImgError, match="use_karras_sigmas"):
        sigmas(8, 16, {**KREA, "use_karras_sigmas": True}, False)
    with pytest.raises(RlhfImgError, match="shift_terminal"):
        sigmas(8, 16, {**KREA, "shift_terminal": 0.1}, False)


X, V, NOISE = (torch.tensor([[[a, b]]]) for a, b in ((2.0, -1.0), (0.5, 1.0), (1.0, -3.0)))


def test_euler_step_by_hand() -> None:
    assert euler_step(X, V, 0.5, 0.25).tolist() == [[[1.875, -1.25]]]
    assert euler_step(X.bfloat16(), V.bfloat16(), 0.5, 0.25).dtype == torch.float32


def test_second_order_is_exact_where_the_velocity_is_linear_in_the_noise_level() -> None:
    # v = 2 s: from s = 0.75 to 0.25, x falls by 0.75^2 - 0.25^2 = 0.5 = 1 * 0.5.
    before, now = (torch.full((1, 1, 1), 2 * s) for s in (0.875, 0.75))
    assert second_order(now, before, 0.875, 0.75, 0.25).item() == 1.0
    assert torch.equal(second_order(V, V, 0.9, 0.5, 0.2), V)


def test_flow_sde_step_by_hand() -> None:
    # s = 0.5, dt = -0.25, eta = 2: g^2 = 4; mean = x (1 - 1) + v (1 + 2) (-0.25) = -0.75 v; std = 2 * 0.5 = 1.
    step = flow_sde_step(X, V, 0.5, 0.25, 2.0, noise=NOISE, sigma_max=0.9)
    assert step.std == 1.0
    assert step.mean.tolist() == [[[-0.375, -0.75]]]
    assert step.x_next.tolist() == [[[0.625, -3.75]]]
    assert step.logp_B.tolist() == pytest.approx([-(1 + 9) / 4 - 0.5 * math.log(2 * math.pi)])


def test_flow_sde_step_from_pure_noise_by_hand() -> None:
    # At s = 1 the second level, 0.75, stands in: g^2 = 1 / 0.25 = 4; mean = x (1 - 2 * 0.25) + v * -0.25; std = 1.
    step = flow_sde_step(X, V, 1.0, 0.75, 1.0, noise=NOISE, sigma_max=0.75)
    assert step.mean.tolist() == [[[0.875, -0.75]]]
    assert step.std == 1.0
    with pytest.raises(ValueError, match="sigma_max must lie between"):
        flow_sde_step(X, V, 1.0, 0.75, 1.0, noise=NOISE, sigma_max=1.0)


def test_dance_sde_step_by_hand() -> None:
    # s = 0.5, dt = -0.25, eta = 2: score = -(x + v / 2) / 0.5 = -(2x + v); mean = x - v/4 + score / 2 = -3v/4; std = 1.
    step = dance_sde_step(X, V, 0.5, 0.25, 2.0, noise=NOISE, sigma_max=0.9)
    assert step.mean.tolist() == [[[-0.375, -0.75]]]
    assert step.std == 1.0
    # s = 1: score = -x; mean = x - v/4 - x * eta^2 / 8.
    step = dance_sde_step(X, V, 1.0, 0.75, 2.0, noise=NOISE, sigma_max=0.9)
    assert step.mean.tolist() == [[[0.875, -0.75]]]


def test_cps_step_by_hand() -> None:
    # s = 0.5, s' = 0.25, eta = 1/3: std = 0.25 sin 30 deg = 0.125.
    # x0 = x - v/2 = (1.75, -1.5), eps = x + v/2 = (2.25, -0.5).
    step = cps_step(X, V, 0.5, 0.25, 1 / 3, noise=NOISE, sigma_max=0.9)
    c = 0.25 * math.sqrt(3) / 2
    assert step.std == pytest.approx(0.125)
    assert step.mean.flatten().tolist() == pytest.approx([0.75 * 1.75 + c * 2.25, -0.75 * 1.5 - c * 0.5])
    assert step.logp_B.tolist() == pytest.approx([-2.5 - math.log(0.125) - 0.5 * math.log(2 * math.pi)])
    # The published form is -mean (x' - mean)^2.
    published = -(step.x_next - step.mean).square().mean()
    constants = math.log(step.std) + 0.5 * math.log(2 * math.pi)
    assert (2 * step.std**2 * (step.logp_B + constants)).item() == pytest.approx(published.item(), rel=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_replay_gives_the_same_bits_and_sampling_noise_carries_no_gradient(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(3, 4, 5, generator=g) for _ in range(3))
    sampled = STEPS[name](x, v, 0.8, 0.6, 0.7, noise=noise, sigma_max=0.9)
    live = v.clone().requires_grad_(True)
    replayed = STEPS[name](x, live, 0.8, 0.6, 0.7, x_next=sampled.x_next, sigma_max=0.9)
    assert torch.equal(sampled.logp_B, replayed.logp_B.detach()) and torch.equal(sampled.mean, replayed.mean.detach())
    assert torch.equal((replayed.logp_B - sampled.logp_B).exp().detach(), torch.ones(3))
    # torch's own density, averaged over the dimensions, is the reference.
    expected = torch.distributions.Normal(sampled.mean, sampled.std).log_prob(sampled.x_next).mean((1, 2))
    torch.testing.assert_close(sampled.logp_B, expected, atol=1e-5, rtol=0)
    # Moving the mean towards the sample makes it likelier: d logp / d mean has the sign of the noise.
    (grad,) = torch.autograd.grad(replayed.logp_B.sum(), live)
    slope = STEPS[name](x, v + 1, 0.8, 0.6, 0.7, noise=noise, sigma_max=0.9).mean - sampled.mean
    assert torch.equal(grad.sign(), (noise * slope).sign())
    own = STEPS[name](x, live, 0.8, 0.6, 0.7, noise=noise, sigma_max=0.9)
    torch.testing.assert_close(torch.autograd.grad(own.logp_B.sum(), live)[0], grad)


@pytest.mark.parametrize("name", STEPS)
def test_no_noise_and_bad_levels_are_errors(name: str) -> None:
    step = STEPS[name]
    with pytest.raises(ValueError, match="eta"):
        step(X, V, 0.5, 0.25, 0.0, noise=NOISE, sigma_max=0.9)
    with pytest.raises(ValueError, match="a step from 0.25 to 0.5"):
        step(X, V, 0.25, 0.5, 1.0, noise=NOISE, sigma_max=0.9)
    with pytest.raises(ValueError, match="either noise"):
        step(X, V, 0.5, 0.25, 0.5, sigma_max=0.9)
    with pytest.raises(ValueError, match="either noise"):
        step(X, V, 0.5, 0.25, 0.5, noise=NOISE, x_next=X, sigma_max=0.9)


def test_cps_has_no_density_at_the_last_step() -> None:
    with pytest.raises(ValueError, match="no log-probability"):
        cps_step(X, V, 0.25, 0.0, 0.8, noise=NOISE, sigma_max=0.9)


# Marginals: data N(m, c^2), whose exact velocity is affine in x, so a step maps one Gaussian to another exactly.


def marginal(m: float, c: float, s: float) -> tuple[float, float]:
    """Mean and variance of x_s."""
    return (1 - s) * m, (1 - s) ** 2 * c**2 + s**2


def exact_velocity(x: torch.Tensor, m: float, c: float, s: float) -> torch.Tensor:
    """E[eps - x0 | x_s = x]."""
    mean, variance = marginal(m, c, s)
    return -m + (s - (1 - s) * c**2) / variance * (x - mean)


def propagate(
    name: str, m: float, c: float, mean: float, variance: float, s: float, s_next: float, eta: float
) -> tuple[float, float]:
    """Mean and variance after a step from N(mean, variance): the step's mean is a x + b, read off at x = 0 and 1."""
    x = torch.tensor([[[0.0]], [[1.0]]])
    noise = torch.zeros_like(x)
    step = STEPS[name](x, exact_velocity(x, m, c, s), s, s_next, eta, noise=noise, sigma_max=0.99)
    b, a = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
    return a * mean + b, a**2 * variance + step.std**2


@pytest.mark.parametrize(("name", "eta"), [("flow_sde", 0.7), ("dance", 0.5)])
@pytest.mark.parametrize("s", [0.8, 0.3])
def test_an_sde_step_keeps_the_marginal_to_second_order(name: str, eta: float, s: float) -> None:
    m, c = 1.5, 0.6
    errors = []
    for dt in (0.08, 0.04):
        reached = propagate(name, m, c, *marginal(m, c, s), s, s - dt, eta)
        true = marginal(m, c, s - dt)
        errors.append([abs(r - t) for r, t in zip(reached, true, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.02
        assert fine < 1e-5 or 3.0 < coarse / fine < 5.5  # a step of half the size, an error of about a quarter


@pytest.mark.parametrize(("name", "eta"), [("flow_sde", 0.7), ("dance", 0.5)])
def test_a_whole_sde_path_ends_nearer_to_the_data_with_more_steps(name: str, eta: float) -> None:
    m, c = 1.5, 0.6
    errors = []
    for steps in (40, 160, 640):
        levels = torch.linspace(0.95, 0.05, steps + 1).tolist()
        mean, variance = marginal(m, c, levels[0])
        for s, s_next in itertools.pairwise(levels):
            mean, variance = propagate(name, m, c, mean, variance, s, s_next, eta)
        true_mean, true_variance = marginal(m, c, levels[-1])
        errors.append(abs(mean - true_mean) + abs(variance - true_variance))
    assert errors[2] < 0.35 * errors[1] < 0.2 * errors[0]  # first order: four times the steps, a quarter of the error
    assert errors[2] < 5e-3


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("s_next", [0.7, 0.2])
def test_cps_is_exact_where_the_data_is_one_point(eta: float, s_next: float) -> None:
    m = 1.5
    reached = propagate("cps", m, 0.0, *marginal(m, 0.0, 0.9), 0.9, s_next, eta)
    assert reached == pytest.approx(marginal(m, 0.0, s_next), abs=1e-5)


def test_cps_on_spread_data_misses_the_variance_by_what_the_docstring_says() -> None:
    m, c, s, eta = 1.5, 0.6, 0.5, 0.8
    mean, variance = propagate("cps", m, c, *marginal(m, c, s), s, s - 1e-4, eta)
    true_mean, true_variance = marginal(m, c, s)
    variance_of_eps = s**2 / true_variance
    missing = s**2 * (1 - math.cos(eta * math.pi / 2)) ** 2 * (1 - variance_of_eps)
    assert mean == pytest.approx(true_mean, abs=1e-3)
    assert missing > 0.02
    assert true_variance - variance == pytest.approx(missing, abs=1e-3)
