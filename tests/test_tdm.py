"""TDM: its mathematics against closed forms, its roles apart from each other, and runs end to end."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny import PROMPTS, tiny_model
from torch import Tensor, nn

from rlhf_img.algorithms import stages as stage_room
from rlhf_img.algorithms import tdm
from rlhf_img.algorithms.stages import CRITIC_TARGETS, Landing, Stages
from rlhf_img.algorithms.tdm import TDMConfig
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.lora import add_role, role, role_parameters
from rlhf_img.model.policy import POLICY, LoRAConfig, Policy, make_full, make_role

CONFIG = TDMConfig(prompts=2, images=2, num_steps=4, critic_updates=1, lr=1e-2, critic_lr=1e-2)
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
        a, b = stage_room.renoise_coefficients(low, high)
        torch.testing.assert_close(a * (1 - low), 1 - high)  # the mean, given x0
        torch.testing.assert_close(a**2 * low**2 + b**2, high**2)  # the variance, given x0
        identity = (high + (1 - high) * low**2 / (1 - low) ** 2) / b
        torch.testing.assert_close((high / b - b) / (1 - high), identity, rtol=1e-3, atol=1e-6)
    (a1, b1), (a2, b2), (a, b) = (stage_room.renoise_coefficients(*pair) for pair in ((s, t), (t, u), (s, u)))
    torch.testing.assert_close(a1 * a2, a)
    torch.testing.assert_close(a2**2 * b1**2 + b2**2, b**2)


@pytest.mark.parametrize("index", range(7))  # in the last stage x_s is x0: see the next test
def test_only_the_ambient_target_is_unbiased_for_what_the_student_lands_on(index: int) -> None:
    stages = in_stage(index, 0.5, 25)
    tolerance = {"rel": 2e-3, "abs": 2e-3}
    _, ambient, truth = critic_of("ambient", stages)
    assert ambient == pytest.approx(truth, **tolerance)
    _, x0, _ = critic_of("tdm_x0", stages)
    assert max(abs(x0[0] - truth[0]), abs(x0[1] - truth[1])) > 0.05
    _, dmd, _ = critic_of("dmd", stages)
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
    noised = stage_room.ambient(Landing(x_BNC=x_s.view(-1, 1, 1), x0_BNC=x_s.view(-1, 1, 1)), stages, n.view(-1, 1, 1))
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
    a, b = (float(c[0]) for c in stage_room.renoise_coefficients(stages.end_B, stages.tau_B))
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
    stages = stage_room.draw_stages(KREA, 20_000, 0.1, torch.Generator().manual_seed(0))
    share = (stages.tau_B - stages.end_B) / (stages.start_B - stages.end_B)
    assert float(share.min()) > 0.099 and float(share.max()) < 0.901
    assert torch.equal(stages.start_B, KREA[stages.index_B]) and torch.equal(stages.end_B, KREA[stages.index_B + 1])
    counts = torch.bincount(stages.index_B, minlength=8) / 20_000
    torch.testing.assert_close(counts, torch.full((8,), 1 / 8), atol=0.01, rtol=0)


def test_the_grid_is_that_of_the_stock_pipeline_for_a_distilled_model() -> None:
    torch.testing.assert_close(tdm.student_grid(tiny_model(), 8), KREA, atol=1e-4, rtol=0)


def test_the_grid_is_that_of_diffusers_scheduler() -> None:
    model = tiny_model()
    scheduler = model.pipeline().scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8).tolist(), mu=1.15)
    torch.testing.assert_close(tdm.student_grid(model, 8), scheduler.sigmas.float(), atol=1e-6, rtol=0)


def exact_critic(target: str, landing: Landing, stages: Stages) -> tuple[float, float]:
    """Slope and offset of the perfect critic where landing and prediction are affine in one normal variable."""
    x, x0 = landing.x_BNC.flatten(), landing.x0_BNC.flatten()
    spread = x.std()
    along = ((x - x.mean()) * (x0 - x0.mean())).mean() / spread
    z, n, weights = gaussian_nodes()
    few = Stages(**{f: getattr(stages, f)[:1].expand(len(z)) for f in ("index_B", "start_B", "end_B", "tau_B")})
    shape = (-1, 1, 1)
    points = Landing(x_BNC=(x.mean() + spread * z).view(shape), x0_BNC=(x0.mean() + along * z).view(shape))
    noised = CRITIC_TARGETS[target](points, few, n.view(shape))
    return regressed(noised.x_BNC.flatten(), noised.target_BNC.flatten(), weights)


def affine_student(steps: int) -> tuple[Tensor, nn.Parameter, nn.Parameter]:
    """Levels, slopes and offsets of the teacher's own Euler steps: its flow is that of N(0.4, 0.5^2)."""
    levels = tdm.student_grid(tiny_model(), steps)
    lines = []
    for t in levels[:-1].tolist():
        at = [_teacher_velocity(torch.tensor(x), min(t, 1 - 1e-4)) for x in (0.0, 1.0)]
        lines.append((float(at[1] - at[0]), float(at[0])))
    slopes, offsets = torch.tensor(lines).T
    return levels, nn.Parameter(slopes.clone()), nn.Parameter(offsets.clone())


def _teacher_velocity(x: Tensor, tau: float) -> Tensor:
    return gaussian_velocity(x, (1 - tau) * 0.4, (1 - tau) ** 2 * 0.25 + tau**2, tau)


def states_of(levels: Tensor, slopes: Tensor, offsets: Tensor) -> list[Tensor]:
    """The student's way from 512 evenly spread normal quantiles."""
    states = [torch.special.ndtri((torch.arange(512) + 0.5) / 512)]
    for k in range(len(levels) - 1):
        states.append(states[-1] + (levels[k + 1] - levels[k]) * (slopes[k] * states[-1] + offsets[k]).detach())
    return states


@pytest.mark.parametrize("steps", [4, 8])
def test_a_gaussian_teacher_is_met_in_few_steps(steps: int) -> None:
    """Euler with few steps ends far from the teacher's law; a student trained with the exact critic ends on it."""
    levels, slopes, offsets = affine_student(steps)
    before = states_of(levels, slopes, offsets)[-1]
    assert abs(float(before.std()) - 0.5) > 0.1
    config = TDMConfig(num_steps=steps, guidance=0.0, norm_floor=10.0)
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam([slopes, offsets], lr=0.05)
    for i in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - i / 120)
        total, states = torch.zeros(()), states_of(levels, slopes, offsets)
        for k in range(steps):
            low, high = float(levels[k + 1]), float(levels[k])
            tau = low + (high - low) * (0.02 + 0.96 * float(torch.rand(1, generator=generator)))
            index, start, end, at = (torch.full((512,), v) for v in (k, high, low, tau))
            stages = Stages(index_B=index, start_B=start, end_B=end, tau_B=at)
            x = states[k].view(-1, 1, 1)
            landing = stage_room.land(x, slopes[k] * x + offsets[k], stages)
            seen = Landing(x_BNC=landing.x_BNC.detach(), x0_BNC=landing.x0_BNC.detach())
            x_tau = stage_room.ambient(seen, stages, torch.randn(x.shape, generator=generator)).x_BNC
            slope, offset = exact_critic("ambient", seen, stages)
            teacher = _teacher_velocity(x_tau, tau)
            loss_B, _ = tdm.student_loss(
                landing.x0_BNC, x_tau, stages.tau_B, teacher, teacher, slope * x_tau + offset, config
            )
            total = total + loss_B.mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    after = states_of(levels, slopes, offsets)[-1]
    assert float(after.std()) == pytest.approx(0.5, abs=0.03) and float(after.mean()) == pytest.approx(0.4, abs=0.03)


def two_modes(share: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([1 - share, share])


def mixture_velocity(x: Tensor, tau: Tensor, share: float, spread: float = 0.25) -> Tensor:
    """The exact flow of a mixture of two round Gaussians in the plane, of which the right one has `share`."""
    means, weights = two_modes(share)
    variance = (1 - tau) ** 2 * spread**2 + tau**2
    apart = x[:, None] - (1 - tau)[..., None] * means
    belongs = (weights.log() - apart.square().sum(-1) / (2 * variance)).softmax(-1)
    x0 = (means + (1 - tau)[..., None] * spread**2 / variance[..., None] * apart) * belongs[..., None]
    return (x - x0.sum(1)) / tau


class Adapted(nn.Module):
    """The teacher's flow and a small network that adds nothing at first, as an adapter would."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.net = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        tau = tau[:, None]
        return mixture_velocity(x, tau, self.share) + self.net(torch.cat([x, tau], 1))


def walked(student: Adapted, levels: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    states = [torch.randn(count, 2, generator=generator)]
    with torch.no_grad():
        for s, s_next in zip(levels.tolist(), levels.tolist()[1:], strict=False):
            v = student(states[-1], torch.full((count,), s))
            states.append(states[-1] + (s_next - s) * v)
    return states


def distil(target: str, guidance: float, steps: int) -> tuple[Tensor, Tensor]:
    """Samples of a student of 4 steps before and after, with the functions of a run on a toy world."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    # In two dimensions the normaliser goes with the direction of the error, and biases it: a constant one instead.
    config = TDMConfig(num_steps=4, guidance=guidance, critic_target=target, norm_floor=10.0)  # type: ignore[arg-type]
    student, critic, levels = Adapted(0.7), Adapted(0.7), torch.tensor([1.0, 0.9045, 0.7595, 0.5128, 0.0])
    before = walked(student, levels, 4000, torch.Generator().manual_seed(1))[-1]
    optimizers = [torch.optim.Adam(net.parameters(), lr=lr) for net, lr in ((student, 3e-3), (critic, 1e-2))]
    for _ in range(steps):
        states = torch.stack(walked(student, levels, 256, generator))
        for _ in range(2):
            stages = stage_room.draw_stages(levels, 256, config.margin, generator)
            x, rows = states[stages.index_B, torch.arange(256)], torch.arange(256)
            taken = (states[stages.index_B + 1, rows] - x) / (stages.end_B - stages.start_B)[:, None]
            noise = torch.randn(x.shape, generator=generator)[:, None]
            noised = CRITIC_TARGETS[target](stage_room.land(x[:, None], taken[:, None], stages), stages, noise)
            loss = tdm.critic_loss(critic(noised.x_BNC[:, 0], stages.tau_B)[:, None], noised).mean()
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        landing = stage_room.land(x[:, None], student(x, stages.start_B)[:, None], stages)
        seen = Landing(x_BNC=landing.x_BNC.detach(), x0_BNC=landing.x0_BNC.detach())
        x_tau, tau = CRITIC_TARGETS[target](seen, stages, noise).x_BNC, stages.tau_B
        with torch.no_grad():
            flows = [mixture_velocity(x_tau[:, 0], tau[:, None], share)[:, None] for share in (0.7, 0.5)]
            flows.append(critic(x_tau[:, 0], tau)[:, None])
        value, _ = tdm.student_loss(landing.x0_BNC, x_tau, tau, *flows, config)
        optimizers[0].zero_grad()
        value.mean().backward()
        optimizers[0].step()
    return before, walked(student, levels, 4000, torch.Generator().manual_seed(1))[-1]


@pytest.mark.parametrize(("share", "sign"), [(0.7, 1), (0.5, 0), (0.3, -1)])
def test_guidance_pulls_to_the_mode_that_the_prompt_favours(share: float, sign: int) -> None:
    """Between two modes, of which the empty prompt has equal shares, the pull is g tau times the difference of their
    flows: towards the mode that the prompt makes likelier, and none where it makes neither."""
    tau, x = torch.tensor([0.5]), torch.zeros(1, 1, 2)
    v_prompt, v_empty = (mixture_velocity(x[0], tau[:, None], s)[None] for s in (share, 0.5))
    x0 = torch.zeros(1, 1, 2, requires_grad=True)
    config = TDMConfig(guidance=1.5, norm_floor=1.0)
    loss, metrics = tdm.student_loss(x0, x, tau, v_prompt, v_empty, v_prompt, config)
    loss.sum().backward()
    assert x0.grad is not None
    assert float(x0.grad[0, 0, 1]) == pytest.approx(0, abs=1e-6) and float(metrics["dm"]) == 0
    # At x = 0 the flow's x0 is +-1 with the modes' shares: their mean 2 share - 1, weighed by the modes' own spread.
    expected = 1.5 * (2 * share - 1) * (1 - 0.5 * 0.5 * 0.0625 / (0.25 * 0.0625 + 0.25))
    assert -float(x0.grad[0, 0, 0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert np.sign(round(-float(x0.grad[0, 0, 0]), 6)) == sign


def test_a_student_of_a_mixture_comes_nearer_to_it() -> None:
    modes, shares = two_modes(0.7)
    generator = torch.Generator().manual_seed(5)
    truth = modes[torch.multinomial(shares, 4000, replacement=True, generator=generator)]
    truth = truth + 0.25 * torch.randn(4000, 2, generator=generator)
    before, after = distil("ambient", 0.0, 100)
    assert wasserstein(after, truth) < 0.9 * wasserstein(before, truth)


def wasserstein(one: Tensor, other: Tensor) -> float:
    """Along the axis of the modes, exact."""
    return float((one[:, 0].sort().values - other[:, 0].sort().values).abs().mean())


@pytest.fixture
def world() -> tuple[Model, Policy, Policy, Conditioner]:
    """A tiny model with a teacher's adapter that is not the base, and student and critic that begin as it."""
    model = tiny_model()
    add_role(model.transformer, "teacher", rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(3)
    for parameter in role_parameters(model.transformer, "teacher").values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    student, critic = (
        make_role(model.transformer, name, LoRAConfig(rank=64), seed=0, start="teacher") for name in (POLICY, "critic")
    )
    return model, student, critic, Conditioner(model)


def look(model: Model, conditioner: Conditioner, name: str | None) -> Tensor:
    text = conditioner.encode(PROMPTS[:1])[0][None]
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), role(model.transformer, name):
        return velocity(model.transformer, x, torch.tensor(0.6), text, (2, 2))


def optimizer_of(policy: Policy, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(policy.parameters.values()), lr=lr)


def test_student_and_critic_begin_as_the_teacher_to_the_bit(world: tuple[Model, Policy, Policy, Conditioner]) -> None:
    model, student, _, conditioner = world
    teacher = look(model, conditioner, "teacher")
    assert torch.equal(look(model, conditioner, POLICY), teacher)
    assert torch.equal(look(model, conditioner, "critic"), teacher)
    assert not torch.equal(look(model, conditioner, None), teacher)
    with student.reference() as transformer:
        assert torch.equal(look(model, conditioner, "teacher"), teacher) and transformer is model.transformer


def test_each_role_trains_alone(world: tuple[Model, Policy, Policy, Conditioner]) -> None:
    model, student, critic, conditioner = world
    names = (None, "teacher", POLICY, "critic")
    state = {key: value.clone() for key, value in model.transformer.state_dict().items()}

    def changed() -> set[str]:
        now = model.transformer.state_dict()
        return {key for key, value in state.items() if not torch.equal(now[key], value)}

    before = {name: look(model, conditioner, name) for name in names}
    sampled = tdm.rollout(model, student, conditioner, PROMPTS[:2], CONFIG, 5)
    generator = torch.Generator().manual_seed(0)
    tdm.train_critic(critic, optimizer_of(critic), sampled, CONFIG, generator)
    moved = changed()
    assert moved and all(".critic." in key for key in moved) and len(moved) == len(critic.parameters)
    for name in (None, "teacher", POLICY):
        assert torch.equal(look(model, conditioner, name), before[name])
    after_critic = look(model, conditioner, "critic")
    assert not torch.equal(after_critic, before["critic"])
    tdm.train_student(student, critic, optimizer_of(student), sampled, CONFIG, generator)
    assert all(p.grad is None for p in role_parameters(model.transformer, "teacher").values())
    assert {key for key in changed() if ".critic." not in key} == {k for k in changed() if f".{POLICY}." in k}
    assert torch.equal(look(model, conditioner, "critic"), after_critic)
    assert torch.equal(look(model, conditioner, "teacher"), before["teacher"])
    assert torch.equal(look(model, conditioner, None), before[None])
    assert not torch.equal(look(model, conditioner, POLICY), before[POLICY])


def test_one_stage_of_an_image_is_evaluated_with_a_graph(
    world: tuple[Model, Policy, Policy, Conditioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, student, critic, conditioner = world
    sampled = tdm.rollout(model, student, conditioner, PROMPTS[:2], CONFIG, 5)
    seen = []

    def counted(*args: object) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return velocity(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tdm, "velocity", counted)
    tdm.train_student(student, critic, optimizer_of(student), sampled, CONFIG, torch.Generator().manual_seed(0))
    # With a graph the student; without one the teacher with and without the prompt, and the critic.
    assert seen == [True, False, False, False] * len(sampled.batches)


def test_full_student_and_critic_are_copies_that_begin_as_the_teacher_and_leave_it_alone() -> None:
    model = tiny_model()
    add_role(model.transformer, "teacher", rank=4, alpha=8.0)
    for i, parameter in enumerate(role_parameters(model.transformer, "teacher").values()):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.requires_grad_(False)
    conditioner = Conditioner(model)
    before = {name: look(model, conditioner, name) for name in (None, "teacher")}
    student, critic = (make_full(model.transformer, name, start="teacher") for name in (POLICY, "critic"))
    own = dataclasses.replace(model, transformer=student.transformer)
    torch.testing.assert_close(look(own, conditioner, None), before["teacher"], atol=1e-5, rtol=1e-4)
    assert not any(".lora_" in name for name in student.parameters)
    sampled = tdm.rollout(own, student, conditioner, PROMPTS[:2], CONFIG, 5)
    generator = torch.Generator().manual_seed(0)
    tdm.train_critic(critic, optimizer_of(critic), sampled, CONFIG, generator)
    torch.testing.assert_close(look(own, conditioner, None), before["teacher"], atol=1e-5, rtol=1e-4)
    tdm.train_student(student, critic, optimizer_of(student), sampled, CONFIG, generator)
    assert (look(own, conditioner, None) - before["teacher"]).abs().max() > 1e-4
    for name, value in before.items():
        assert torch.equal(look(model, conditioner, name), value)
    with student.reference() as reference:
        assert reference is model.transformer


def test_without_guidance_a_student_that_is_the_teacher_has_nothing_to_learn_from_an_equal_critic(
    world: tuple[Model, Policy, Policy, Conditioner],
) -> None:
    model, student, critic, conditioner = world
    config = dataclasses.replace(CONFIG, guidance=0.0)
    sampled = tdm.rollout(model, student, conditioner, PROMPTS[:2], config, 5)
    metrics = tdm.train_student(student, critic, optimizer_of(student), sampled, config, torch.Generator())
    assert metrics["dm"] == metrics["guidance"] == metrics["grad_norm"] == 0.0


def test_rates_fall_to_nothing_over_the_warm_up_and_over_what_is_left() -> None:
    config = TDMConfig(warmup=4, warmup_lr=8.0, lr=1.0)
    assert [config.lr_at(i, 6) for i in range(1, 7)] == [8.0, 6.0, 4.0, 2.0, 1.0, 0.5]
    assert TDMConfig(warmup=0, lr=1.0).lr_at(1, 4) == 1.0


@pytest.mark.parametrize("steps", [1, 3])
def test_warming_up_takes_the_student_where_the_guided_teacher_gets_and_moves_nothing_else(
    world: tuple[Model, Policy, Policy, Conditioner], steps: int
) -> None:
    model, student, _, conditioner = world
    config = dataclasses.replace(CONFIG, guidance=1.5, warmup_substeps=steps, max_grad_norm=1e9)
    sampled = tdm.rollout(model, student, conditioner, PROMPTS[:2], config, 5)
    before = {name: look(model, conditioner, name) for name in (None, "teacher", "critic")}
    metrics = tdm.teach_guidance(student, optimizer_of(student, 0.0), sampled, config, torch.Generator().manual_seed(9))
    fast = {name: p.grad.clone() for name, p in student.parameters.items() if p.grad is not None}
    empty = conditioner.encode([""])[0][None]
    stages = stage_room.draw_stages(sampled.levels_S, sampled.total, config.margin, torch.Generator().manual_seed(9))
    total = torch.zeros(())
    for batch in sampled.batches:
        for b, i in enumerate(batch.places_B):
            x, start, end = batch.states_SBNC[stages.index_B[i], b : b + 1], stages.start_B[i], stages.end_B[i]

            def flow(name: str, text: Tensor, x: Tensor, level: Tensor) -> Tensor:
                with role(model.transformer, name):
                    return velocity(model.transformer, x, level, text, sampled.grid)

            text, there = batch.text_BLD[b : b + 1], x
            for k in range(steps):
                level = start + (end - start) * k / steps
                guided = 2.5 * flow("teacher", text, there, level) - 1.5 * flow("teacher", empty, there, level)
                there = (there + (end - start) / steps * guided).detach()
            landing = x + (end - start) * flow(POLICY, text, x, start)
            total = total + ((landing - there) / (end - start)).square().mean() / sampled.count
    assert metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    slow = torch.autograd.grad(total, list(student.parameters.values()))
    for name, expected in zip(student.parameters, slow, strict=True):
        torch.testing.assert_close(fast[name], expected, rtol=5e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7)
    optimizer = optimizer_of(student)
    for _ in range(20):
        after = tdm.teach_guidance(student, optimizer, sampled, config, torch.Generator().manual_seed(9))
    assert after["loss"] < 0.95 * metrics["loss"]
    for name, value in before.items():
        assert torch.equal(look(model, conditioner, name), value)


@pytest.mark.parametrize("target", list(CRITIC_TARGETS))
def test_gradients_are_those_of_a_slow_loop(world: tuple[Model, Policy, Policy, Conditioner], target: str) -> None:
    model, student, critic, conditioner = world
    config = dataclasses.replace(CONFIG, critic_target=target, guidance=1.5, max_grad_norm=1e9)  # type: ignore[arg-type]
    for parameter in critic.parameters.values():
        parameter.data *= 1.1
    sampled = tdm.rollout(model, student, conditioner, PROMPTS[:2], config, 5)
    tdm.train_student(student, critic, optimizer_of(student, 0.0), sampled, config, torch.Generator().manual_seed(9))
    tdm.train_critic(critic, optimizer_of(critic, 0.0), sampled, config, torch.Generator().manual_seed(9))
    fast = [{n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None} for policy in world[1:3]]
    empty = conditioner.encode([""])[0][None]
    totals = [torch.zeros(()), torch.zeros(())]
    generator = torch.Generator().manual_seed(9)

    def flow(name: str, x: Tensor, tau: float, text: Tensor) -> Tensor:
        with role(model.transformer, name):
            return velocity(model.transformer, x, torch.tensor(tau), text, sampled.grid)

    stages = stage_room.draw_stages(sampled.levels_S, sampled.total, config.margin, generator)
    noise = torch.randn((sampled.total, 4, 64), generator=generator)
    for batch in sampled.batches:
        for b, i in enumerate(batch.places_B):
            k = int(stages.index_B[i])
            x, n, text = batch.states_SBNC[k, b : b + 1], noise[i : i + 1], batch.text_BLD[b : b + 1]
            start, s, tau = (float(level[i]) for level in (stages.start_B, stages.end_B, stages.tau_B))
            v = flow(POLICY, x, start, text)
            x0, x_s = x - start * v, (x + (s - start) * v).detach()
            a = (1 - tau) / (1 - s)
            b2 = tau**2 - a**2 * s**2
            x_tau = a * x_s + b2**0.5 * n
            if target == "dmd":
                x_tau = (1 - tau) * x0.detach() + tau * n
            v_t, v_u = flow("teacher", x_tau, tau, text).detach(), flow("teacher", x_tau, tau, empty).detach()
            v_c = flow("critic", x_tau, tau, text)
            guided = 2.5 * v_t - 1.5 * v_u
            pull = -tau * (guided - v_c.detach())  # x0 of the guided teacher minus that of the critic
            norm = (x0 - (x_tau - tau * guided)).abs().mean().detach()
            totals[0] = totals[0] - 2 * (pull * x0).mean() / norm
            spread = (1 - s) ** 2 + s**2
            goal, weight = {
                "ambient": ((x_tau - tau * n / b2**0.5) / (tau - 1),
                            b2 * (1 - s) ** 2 * (a**2 * spread + b2) / (tau**2 * spread)),
                "tdm_x0": ((x_tau - x0.detach()) / tau, 1.0), "dmd": (n - x0.detach(), 1.0),
            }[target]  # fmt: skip
            totals[1] = totals[1] + weight * (v_c - goal).square().mean()
    for policy, total, found in zip(world[1:3], totals, fast, strict=True):
        slow = torch.autograd.grad(total / sampled.count, list(policy.parameters.values()))
        for name, expected in zip(policy.parameters, slow, strict=True):
            torch.testing.assert_close(found[name], expected, rtol=5e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7)
