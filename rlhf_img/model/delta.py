"""What weights alone say about how an adapter will act on another checkpoint of its model."""

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.lora import role_parameters


@torch.no_grad()
def predictors(source: Krea2Transformer2DModel, target: Krea2Transformer2DModel, role: str) -> dict[str, float | None]:
    """Of the adapter `role` on `source`, against D = W_target - W_source, over the layers that it changes:

    `distilled`: |D| / |W_source| in the Frobenius norm; `lora`: |scale B A| / |W_source|; `overlap`: the share of
    |scale B A|^2 within the span of as many of D's leading left singular vectors as the adapter has ranks; `chance`:
    the same for a random span. `overlap` and `chance` are None where D is 0. Raises RlhfImgError if shapes differ.
    """
    parameters = role_parameters(source, role)
    sums = dict.fromkeys(("weight", "delta", "lora", "inside", "chance"), 0.0)
    for path in sorted({key.rpartition(".")[0] for key in parameters}):
        layer, other = source.get_submodule(path), target.get_submodule(path)
        weight, changed = (getattr(m, "base_layer", m).weight.float() for m in (layer, other))
        if weight.shape != changed.shape:
            raise RlhfImgError(f"{path} has the shape {tuple(weight.shape)} in one model and {tuple(changed.shape)} in "
                               "the other: a LoRA can only be carried between checkpoints of one architecture")
        a, b = (parameters[f"{path}.{part}"].float() for part in ("lora_A", "lora_B"))
        b = b * float(layer.scaling[role])
        delta = changed.to(weight.device) - weight
        update = _square(b @ a)
        sums["weight"] += _square(weight)
        sums["delta"] += _square(delta)
        sums["lora"] += update
        sums["inside"] += _square(_leading(delta, b.shape[1]).T @ b @ a)
        sums["chance"] += update * min(1.0, b.shape[1] / b.shape[0])
    moved = sums["delta"] > 0 and sums["lora"] > 0
    return {
        "distilled": (sums["delta"] / sums["weight"]) ** 0.5, "lora": (sums["lora"] / sums["weight"]) ** 0.5,
        "overlap": sums["inside"] / sums["lora"] if moved else None,
        "chance": sums["chance"] / sums["lora"] if moved else None,
    }  # fmt: skip


def _square(x: Tensor) -> float:
    return float(x.square().sum())


def _leading(delta: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors; none for directions in which nothing changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the decomposition starts from random vectors
        u, s, _ = torch.svd_lowrank(delta, q=min(rank, *delta.shape), niter=4)
    return u[:, s > 1e-6 * s.max()] if float(s.max()) > 0 else u[:, :0]
