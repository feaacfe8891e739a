"""Preference optimisation of a flow model: DPO, IPO, and STPO candidates that do not push the winner away.

A pair is two images of one prompt, of which w is preferred to l. Both are noised to x = (1 - s) x0 + s eps with the
same s and eps; e = mean |v_theta(x, s) - (eps - x0)|^2 over dimensions stands for minus the log-likelihood, and a
change is against the reference: d_w = e_w - e_w^ref, d_l = e_l - e_l^ref. The implicit margin is m = d_l - d_w. With
drift D = mean |v_theta - v_ref|^2 and z(m) = beta / 2 m,

    dpo           -log sigmoid(z(m))                      Diffusion-DPO (arXiv 2311.12908), Flow-DPO (2501.13918)
    ipo           (z(m) - 1/2)^2                          IPO (2310.12036): the margin has a target, not a slope
    stpo-anchor   -log sigmoid(z(m - anchor (d_w)+))      after DPOP (2402.13228)
    stpo-guard    dpo, with the losers' gradient scaled by min(1, |G_w|^2 / -<G_w, G_l>)
    stpo-mirror   -log sigmoid(z(m - (1 + curvature) D_l))

Why. With a = v_ref - u and delta = v_theta - v_ref, a change is d = 2 <a, delta> + D. DPO's margin is therefore

    m = 2 <a_l, delta_l> - 2 <a_w, delta_w>  +  D_l - D_w

and pays D_l for leaving the reference on losers in any direction, without end; winner and loser share weights, so the
winner's error rises with it. That is the divergence that Krea 2's report describes: a growing margin while both become
less likely. Its STPO, "an auxiliary loss and a change of DPO's form", has no published formula; three answers are here:

- anchor: once the winner is worse than under the reference, it weighs 1 + anchor times as much as the loser.
- guard: G_w and G_l are the gradients of the loss through the winners and the losers of the batch. A step along
  -(G_w + c G_l) changes the winners' part by -(|G_w|^2 + c <G_w, G_l>), which is not above 0 for the c above: exact to
  first order for plain gradient descent on this batch. Diffusion-SDPO (2511.03317) bounds the same in output space for
  every pair, which takes the two Jacobians for equal.
- mirror: the sign of D_l is turned. With curvature 1 the loser's change is that of |(2 v_ref - v_theta) - u_l|^2: the
  velocity's mirror image is fitted to the loser, as DiffusionNFT (2509.16117) does with bad images. The margin then is
  at most |a_w|^2 + |a_l|^2 / curvature, the loss convex in the velocities and least at a finite one, and at the
  reference its gradient is DPO's own. To hold the winner beside it, by a hinge on its rise or by flow matching on it
  (RPO, 2405.16436), was tried and left out: with unequal weights the noise that a pair shares no longer cancels, and
  the held-out margin was a third to two thirds (experiments/dpo-stpo-embedded).

Beta depends on the reduction: `beta_mean` is for errors averaged over dimensions, `beta_mean` / (N C) for their sum.

Left out: guidance, an average of the margin over noise before the sigmoid (Diffusion-DPO's bound, by Jensen, is the
mean of the loss), weights by noise level.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_img.algorithms.rollout import AverageGradients, alone, require
from rlhf_img.model.forward import velocity
from rlhf_img.model.policy import Policy
from rlhf_img.model.sharding import even, whole


@dataclass(frozen=True, kw_only=True, slots=True)
class DPOConfig:
    """Settings of preference optimisation."""

    loss: Literal["dpo", "ipo", "stpo-anchor", "stpo-guard", "stpo-mirror"] = "stpo-mirror"
    """What is minimised; see the head of algorithms/dpo.py."""
    beta_mean: float | None = None
    """Strength of the preference on errors averaged over dimensions (published: 2000 to 5000, and 100). None:
    measured. Divided by the latent's dimensions it is the beta of summed errors."""
    calibration_steps: int = 3
    """With `beta_mean` None: optimiser steps of a trial, which is then undone."""
    calibration_drift: float = 0.01
    """With `beta_mean` None: how far the policy may go before a typical pair is decided: drift, in shares of the
    reference's error."""
    calibration_logit: float = 1.0
    """With `beta_mean` None: |z| of a typical pair (root mean square) there; 1 is a probability of 73 %."""
    anchor: float = 1.0
    """stpo-anchor: extra weight of the winner where it has become worse than under the reference."""
    curvature: float = 1.0
    """stpo-mirror: how soon moving away from a loser stops paying; 1 mirrors the velocity, larger stops sooner."""
    pairs: int = 32
    """Pairs an iteration."""
    draws: int = 2
    """Noise levels at which a pair is trained, one in each of so many equal parts of the range."""
    min_sigma: float = 0.6
    """The lowest noise level of a draw."""
    max_sigma: float = 0.9
    """The highest."""
    lr: float = 1e-3
    """Learning rate of AdamW at the start; it falls linearly to 0 over the run."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema: float = 0.9
    """Decay, an optimiser step, of the averaged weights."""
    batch_size: int = 128
    """Images a forward, at most."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values that cannot work together."""
        require(
            {
                "dpo.beta_mean must be above 0, or null to be measured": self.beta_mean is None or self.beta_mean > 0,
                "dpo.pairs, dpo.draws and dpo.calibration_steps must be 1 or more":
                    min(self.pairs, self.draws, self.calibration_steps) >= 1,
                "dpo.batch_size must be 2 or more: a pair is two images": self.batch_size >= 2,
                "dpo.lr, dpo.calibration_drift, dpo.calibration_logit and dpo.max_grad_norm must be above 0":
                    min(self.lr, self.calibration_drift, self.calibration_logit, self.max_grad_norm) > 0,
                "dpo.anchor and dpo.curvature must be 0 or more": min(self.anchor, self.curvature) >= 0,
                "dpo.min_sigma must be 0 or more and below dpo.max_sigma, which is at most 1":
                    0 <= self.min_sigma < self.max_sigma <= 1,
                "dpo.ema must lie between 0 and 1, 1 excluded": 0 <= self.ema < 1,
            },
            self,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PairErrors:
    """Errors of B pairs, each a mean over dimensions of a squared difference of velocities."""

    winner_B: Tensor
    """Policy against the target eps - x0."""
    loser_B: Tensor
    winner_ref_B: Tensor
    """Reference against the target."""
    loser_ref_B: Tensor
    winner_drift_B: Tensor
    """Policy against the reference."""
    loser_drift_B: Tensor

    @property
    def rise_B(self) -> Float[Tensor, " B"]:
        """Change of the winner's error against the reference; above 0 its likelihood has fallen."""
        return self.winner_B - self.winner_ref_B

    @property
    def margin_B(self) -> Float[Tensor, " B"]:
        """The implicit margin, above 0 where the policy has moved towards the winner."""
        return (self.loser_B - self.loser_ref_B) - self.rise_B


def dpo_loss(errors: PairErrors, beta: float, config: DPOConfig) -> Float[Tensor, " B"]:
    """-log sigmoid(beta / 2 m); log 2 where the policy is the reference."""
    return -F.logsigmoid(beta / 2 * errors.margin_B)


def ipo_loss(errors: PairErrors, beta: float, config: DPOConfig) -> Float[Tensor, " B"]:
    """(beta / 2 m - 1/2)^2; 1/4 where the policy is the reference, least at the margin 1 / beta."""
    return (beta / 2 * errors.margin_B - 0.5).square()


def anchored_loss(errors: PairErrors, beta: float, config: DPOConfig) -> Float[Tensor, " B"]:
    """DPO with `anchor` times the winner's rise above the reference taken from the margin."""
    return -F.logsigmoid(beta / 2 * (errors.margin_B - config.anchor * errors.rise_B.relu()))


def mirrored_loss(errors: PairErrors, beta: float, config: DPOConfig) -> Float[Tensor, " B"]:
    """DPO with the loser's drift turned from a gain into a cost."""
    return -F.logsigmoid(beta / 2 * (errors.margin_B - (1 + config.curvature) * errors.loser_drift_B))


@dataclass(frozen=True, slots=True)
class Method:
    """A loss of pairs, and whether the losers' gradient is held back where it would raise the winners' error."""

    loss: Callable[[PairErrors, float, DPOConfig], Tensor]
    guarded: bool = False


METHODS: Mapping[str, Method] = {
    "dpo": Method(dpo_loss),
    "ipo": Method(ipo_loss),
    "stpo-anchor": Method(anchored_loss),
    "stpo-guard": Method(dpo_loss, guarded=True),
    "stpo-mirror": Method(mirrored_loss),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedPairs:
    """B pairs of one prompt length and size, noised alike; the targets are the velocities eps - x0 that lead there."""

    text_BLD: Tensor
    sigma_B: Tensor
    winner_BNC: Tensor
    loser_BNC: Tensor
    winner_target_BNC: Tensor
    loser_target_BNC: Tensor
    grid: tuple[int, int]

    def split(self, size: int) -> list["NoisedPairs"]:
        """In parts of at most `size` pairs."""
        names = ("text_BLD", "sigma_B", "winner_BNC", "loser_BNC", "winner_target_BNC", "loser_target_BNC")
        parts = zip(*(getattr(self, name).split(size) for name in names), strict=True)
        return [NoisedPairs(grid=self.grid, **dict(zip(names, part, strict=True))) for part in parts]


def noised(
    winner_BNC: Float[Tensor, "B N C"], loser_BNC: Float[Tensor, "B N C"], text_BLD: Float[Tensor, "B L D"],
    sigma_B: Float[Tensor, " B"], noise_BNC: Float[Tensor, "B N C"], grid: tuple[int, int],
) -> NoisedPairs:  # fmt: skip
    """Clean latents of both images of each pair, brought to the same level with the same noise."""
    s = sigma_B[:, None, None]
    return NoisedPairs(
        text_BLD=text_BLD, sigma_B=sigma_B, grid=grid,
        winner_BNC=torch.lerp(winner_BNC, noise_BNC, s), winner_target_BNC=noise_BNC - winner_BNC,
        loser_BNC=torch.lerp(loser_BNC, noise_BNC, s), loser_target_BNC=noise_BNC - loser_BNC,
    )  # fmt: skip


def pair_errors(
    winner_BNC: Tensor, loser_BNC: Tensor, winner_ref_BNC: Tensor, loser_ref_BNC: Tensor, pairs: NoisedPairs
) -> PairErrors:
    """From velocities of the policy and of the reference."""

    def error(v_BNC: Tensor, target_BNC: Tensor) -> Tensor:
        return (v_BNC - target_BNC).square().flatten(1).mean(1)

    return PairErrors(
        winner_B=error(winner_BNC, pairs.winner_target_BNC), loser_B=error(loser_BNC, pairs.loser_target_BNC),
        winner_ref_B=error(winner_ref_BNC, pairs.winner_target_BNC),
        loser_ref_B=error(loser_ref_BNC, pairs.loser_target_BNC),
        winner_drift_B=error(winner_BNC, winner_ref_BNC), loser_drift_B=error(loser_BNC, loser_ref_BNC),
    )  # fmt: skip


def _velocities(transformer: torch.nn.Module, pairs: NoisedPairs) -> tuple[Tensor, Tensor]:
    """Of the winners and of the losers: two forwards, because their gradients are needed apart."""
    winner, loser = (
        velocity(transformer, x_BNC, pairs.sigma_B, pairs.text_BLD, pairs.grid)
        for x_BNC in (pairs.winner_BNC, pairs.loser_BNC)
    )
    return winner, loser


@torch.no_grad()
def measure(policy: Policy, batches: Sequence[NoisedPairs], config: DPOConfig) -> PairErrors:
    """Errors of pairs without training on them."""
    found, parts = [], _parts(batches, config)
    for pairs in even(policy.transformer, parts):
        with policy.reference() as reference:
            refs = _velocities(reference, pairs)
        with policy.acting() as transformer:
            found.append(pair_errors(*_velocities(transformer, pairs), *refs, pairs))
    return joined(found[: len(parts)])


def joined(parts: Sequence[PairErrors]) -> PairErrors:
    """The errors of all pairs, on the CPU."""
    names = PairErrors.__dataclass_fields__
    return PairErrors(**{name: torch.cat([getattr(errors, name).cpu() for errors in parts]) for name in names})


def gradients(
    policy: Policy, pairs: NoisedPairs, method: Method, beta: float, config: DPOConfig
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, PairErrors]:
    """Of the summed loss: through the winners, and through the losers, by parameter; then loss and errors by pair."""
    parameters = list(policy.parameters.values())
    with policy.reference() as reference:
        refs = _velocities(reference, pairs)
    with policy.acting() as transformer:
        velocities = _velocities(transformer, pairs)
        # Through a leaf for each side, so that one loss gives two gradients.
        leaves = velocities[0].detach().requires_grad_(), velocities[1].detach().requires_grad_()
        errors = pair_errors(*leaves, *refs, pairs)
        loss_B = method.loss(errors, beta, config)
        towards = torch.autograd.grad(loss_B.sum(), leaves)
        winner, loser = (
            _backward(v, direction, parameters) for v, direction in zip(velocities, towards, strict=True)
        )
    return winner, loser, loss_B.detach(), errors


def _backward(v_BNC: Tensor, direction_BNC: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """The gradients of <v, direction>, by way of `.grad`, where alone a sharded parameter's is."""
    for parameter in parameters:
        parameter.grad = None
    v_BNC.backward(direction_BNC)
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))


def guard_scale(winner: Sequence[Tensor], loser: Sequence[Tensor]) -> float:
    """The largest share c <= 1 of the losers' gradient with <winner, winner + c loser> >= 0."""
    along = sum(float(whole((w * el).sum())) for w, el in zip(winner, loser, strict=True))
    own = sum(float(whole(w.square().sum())) for w in winner)
    return 1.0 if own + along >= 0 else own / -along


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batches: Sequence[NoisedPairs], beta: float, config: DPOConfig,
    method: Method | None = None, average_gradients: AverageGradients = alone,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step on pairs, with `config.loss` or another method; the average is the caller's.

    `average_gradients` is called on what is to be the gradient, for runs of several processes.
    Returns means over pairs and draws of the loss and of `describe`, the gradient norm and the share of the losers'
    gradient that was kept. Raises FloatingPointError before a step whose gradient is not finite.
    """
    method = method or METHODS[config.loss]
    count = sum(len(pairs.sigma_B) for pairs in batches)
    winner, loser = ([torch.zeros_like(p) for p in policy.parameters.values()] for _ in range(2))
    loss, seen = 0.0, []
    for pairs in _parts(batches, config):
        to_winner, to_loser, loss_B, errors = gradients(policy, pairs, method, beta, config)
        torch._foreach_add_(winner, to_winner, alpha=1 / count)
        torch._foreach_add_(loser, to_loser, alpha=1 / count)
        loss += float(loss_B.sum()) / count
        seen.append({name: value * len(loss_B) / count for name, value in describe(errors, beta).items()})
    parameters = list(policy.parameters.values())
    for side in (winner, loser):
        for parameter, gradient in zip(parameters, side, strict=True):
            parameter.grad = gradient
        average_gradients(parameters)  # in place
    scale = guard_scale(winner, loser) if method.guarded else 1.0
    for parameter, w, el in zip(parameters, winner, loser, strict=True):
        parameter.grad = w + scale * el
    norm = policy.clip_gradients(config.max_grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient is not finite (loss {loss:.4g}): no step was taken")
    optimizer.step()
    means = with_rises({name: sum(part[name] for part in seen) for name in seen[0]})
    return {"loss": loss, **means, "pairs/loser_gradient": scale, "grad_norm": float(norm)}


@torch.no_grad()
def describe(errors: PairErrors, beta: float) -> dict[str, float]:
    """Means over pairs of what tells learning from divergence."""
    margin_B = errors.margin_B
    return {
        "pairs/margin": float(margin_B.mean()),
        "pairs/accuracy": float((margin_B > 0).float().mean() + 0.5 * (margin_B == 0).float().mean()),
        "pairs/decided": float(torch.sigmoid(beta / 2 * margin_B).mean()),
        "pairs/winner_error": float(errors.winner_B.mean()),
        "pairs/winner_error_ref": float(errors.winner_ref_B.mean()),
        "pairs/loser_error": float(errors.loser_B.mean()),
        "pairs/loser_error_ref": float(errors.loser_ref_B.mean()),
        "pairs/drift": float((errors.winner_drift_B + errors.loser_drift_B).mean() / 2),
    }


def with_rises(means: Mapping[str, float]) -> dict[str, float]:
    """The means of `describe` with the changes of both errors, in shares of the reference's; best if below 0."""
    rises = {
        f"pairs/{side}_rise": means[f"pairs/{side}_error"] / means[f"pairs/{side}_error_ref"] - 1
        for side in ("winner", "loser")
    }
    return {**means, **rises}


def calibrated_beta(
    policy: Policy, trial: Sequence[Sequence[NoisedPairs]], measured: Sequence[NoisedPairs], config: DPOConfig,
    average_gradients: AverageGradients = alone, gather: Callable[[PairErrors], PairErrors] = lambda errors: errors,
) -> float:  # fmt: skip
    """`beta_mean` for which a typical pair is at |z| = `calibration_logit` where the drift is `calibration_drift`.

    A trial, which is then undone, takes one step on each entry of `trial` with the loss -m: what DPO becomes for small
    beta, where AdamW's steps do not depend on it. From the spread and the drift of `measured` after it, with the drift
    D* = `calibration_drift` times the reference's error,

        beta = 2 calibration_logit / spread*,    spread* = rms(m) sqrt(D* / D)

    since near the reference m is linear in the velocities and D quadratic. So it depends on data and model, and hardly
    on how large the trial's steps were. `gather` gives the errors of all processes' pairs. Raises FloatingPointError if
    the trial does not move or is not finite.
    """
    method = Method(lambda errors, beta, config: -errors.margin_B)
    kept = {name: p.detach().clone() for name, p in policy.parameters.items()}
    optimizer = torch.optim.AdamW(list(policy.parameters.values()), lr=config.lr, weight_decay=config.weight_decay)
    for batches in trial:
        update(policy, optimizer, batches, 1.0, config, method, average_gradients)
    errors = gather(measure(policy, measured, config))
    drift = float((errors.winner_drift_B + errors.loser_drift_B).mean() / 2)
    allowed = config.calibration_drift * float((errors.winner_ref_B + errors.loser_ref_B).mean() / 2)
    spread = float(errors.margin_B.square().mean().sqrt())
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter.copy_(kept[name])
            parameter.grad = None
    if not (math.isfinite(spread) and min(spread, drift) > 0):
        raise FloatingPointError(f"after a trial of {len(trial)} steps the margin's spread is {spread}, drift {drift}")
    return 2 * config.calibration_logit / spread * math.sqrt(drift / allowed)


def _parts(batches: Sequence[NoisedPairs], config: DPOConfig) -> list[NoisedPairs]:
    return [part for pairs in batches for part in pairs.split(max(1, config.batch_size // 2))]
