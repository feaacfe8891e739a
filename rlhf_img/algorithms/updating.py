"""What online algorithms share between a rollout and an optimiser step."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.algorithms.rollout import AverageGradients, Batch, Draw, Rollout
from rlhf_img.model.forward import velocity
from rlhf_img.model.policy import Policy

Losses = Callable[[Rollout], Iterator[tuple[Tensor, Mapping[str, Tensor], Tensor]]]
"""Gives the losses of some images with a graph, metrics without, and how many images each stands for, all [B], until
every term was there once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Some draws of the images of one batch: an image is there once for each."""

    rows_B: list[int]
    """Where these images are in the iteration."""
    x_BNC: Tensor
    sigma_B: Tensor
    text_BLD: Tensor
    target_BNC: Tensor
    old_BNC: Tensor | None
    weight_B: Tensor
    """How many images of the batch each stands for."""


def together(batch: Batch, batch_size: int) -> Iterator[Draws]:
    """The draws of a batch in parts as even as `batch_size` images a part allow; none if its terms are steps."""
    if not (draws := [term for term in batch.terms if isinstance(term, Draw)]):
        return
    images, device = len(batch.rows_B), batch.text_BLD.device
    place = torch.tensor([row for draw in draws for row in draw.rows], device=device)
    sigma = torch.tensor([draw.sigma for draw in draws for _ in draw.rows], device=device)
    weight = torch.tensor([images / len(draw.rows) for draw in draws for _ in draw.rows], device=device)
    x, target = torch.cat([draw.x_BNC for draw in draws]), torch.cat([draw.target_BNC for draw in draws])
    known = [draw.old_BNC for draw in draws if draw.old_BNC is not None]
    old = torch.cat(known) if known else None
    size = math.ceil(len(place) / math.ceil(len(place) / batch_size))
    for first in range(0, len(place), size):
        part = slice(first, first + size)
        yield Draws(
            rows_B=[batch.rows_B[i] for i in place[part].tolist()], x_BNC=x[part], sigma_B=sigma[part],
            text_BLD=batch.text_BLD[place[part]], target_BNC=target[part], old_BNC=None if old is None else old[part],
            weight_B=weight[part],
        )  # fmt: skip


def velocities(
    policy: Policy, sampled: Rollout, x_BNC: Float[Tensor, "B N C"], sigma: Tensor, text_BLD: Float[Tensor, "B L D"],
    guidance: float | None, guided_from: float = 0.0,
) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N C"] | None]:  # fmt: skip
    """That of the policy, with a graph, and that of the reference, with None no second one.

    The reference has Krea's g at noise levels from `guided_from` on, and no guidance below.
    """
    with policy.acting() as transformer:
        v = velocity(transformer, x_BNC, sigma, text_BLD, sampled.grid)
    if guidance is None:
        return v, None
    with policy.reference() as reference:
        v_ref = velocity(reference, x_BNC, sigma, text_BLD, sampled.grid)
        guided_B = sigma.expand(len(x_BNC)) >= guided_from
        if guidance > 0 and guided_B.any():
            sigma = sigma if sigma.numel() == 1 else sigma[guided_B]
            empty_BLD = sampled.empty_LD.expand(int(guided_B.sum()), -1, -1)
            v_empty = velocity(reference, x_BNC[guided_B], sigma, empty_BLD, sampled.grid)
            v_ref[guided_B] += guidance * (v_ref[guided_B] - v_empty)
    return v, v_ref


def split(sampled: Rollout, count: int) -> list[Rollout]:
    """The rollout in `count` parts of whole batches, as even as its batches allow."""
    if count == 1:
        return [sampled]
    parts: list[list[Batch]] = [[] for _ in range(count)]
    for batch in sorted(sampled.batches, key=lambda b: -len(b.rows_B)):
        min(parts, key=lambda part: sum(len(b.rows_B) for b in part)).append(batch)
    return [replace(sampled, batches=part) for part in parts if part]


def optimise(
    policy: Policy, optimizer: torch.optim.Optimizer, part: Rollout, losses: Losses, max_grad_norm: float,
    average_gradients: AverageGradients,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step on the mean loss over images and terms; the average is the caller's.

    Returns means of the metrics, and the gradient norm. Raises FloatingPointError before a step that is not finite.
    """
    count = sum(len(batch.rows_B) * len(batch.terms) for batch in part.batches)
    means: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for loss_B, metrics, weight_B in losses(part):
        with policy.acting():  # checkpointing repeats the forward
            ((loss_B * weight_B).sum() / count).backward()
        for name, value_B in metrics.items():
            means[name] = means.get(name, 0.0) + float((value_B * weight_B).sum()) / count
    average_gradients(list(policy.parameters.values()))
    norm = policy.clip_gradients(max_grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient is not finite (loss {means['loss']:.4g}): no step was taken")
    optimizer.step()
    return {**means, "grad_norm": float(norm)}
