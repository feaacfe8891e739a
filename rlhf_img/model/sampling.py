"""Deterministic sampling: latents from prompts and seeds."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import euler_step, sigmas
from rlhf_img.model.forward import in_batches, velocity
from rlhf_img.model.loading import Model
from rlhf_img.model.lora import drawing
from rlhf_img.model.sharding import even
from rlhf_img.model.vae import pack


def initial_noise(model: Model, seeds: Sequence[int], height: int, width: int) -> Float[Tensor, "B N C"]:
    """Standard normal float32 packed latents, one seed an image, the same on every device.

    Equal to the stock pipeline's in float32 with one CPU generator an image.
    """
    h, w = model.grid(height, width)
    p = model.patch_size
    shape = (1, model.transformer.config.in_channels // p**2, h * p, w * p)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return pack(torch.cat(noise), p).to(model.device)


@drawing()
def sample(
    model: Model,
    conditioner: Conditioner,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int | None = None,
    guidance: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "B N C"]:
    """Packed float32 latents, one image per prompt and seed, with the LoRA role that is active now.

    An image depends on its prompt and seed alone, and on what shares its batch only by rounding.

    Args:
        num_steps: Euler steps; default 8 for a distilled model, 28 otherwise.
        guidance: Krea's g in v = c + g (c - u), with u of the empty prompt; 0 = off, and half the cost.
        height, width: in pixels; default the model's own size.
        batch_size: images a forward, at most; they share a prompt length, so that no padding is needed.
        progress: called after every step of a batch with the image-steps done and their total.

    Raises RlhfImgError for sizes, steps or guidance out of range.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"each prompt needs one seed; got {len(prompts)} prompts and {len(seeds)} seeds")
    if guidance < 0:
        raise RlhfImgError(f"guidance must be 0 (off) or more; got {guidance}. The common scale w is 1 + guidance")
    height, width = height or model.default_size, width or model.default_size
    grid = model.grid(height, width)
    steps = num_steps if num_steps is not None else (8 if model.is_distilled else 28)
    levels = sigmas(steps, grid[0] * grid[1], model.scheduler.config, model.is_distilled)
    x_BNC = initial_noise(model, seeds, height, width)
    empty = conditioner.encode([""])[0] if guidance > 0 else None

    done = 0
    batches = in_batches(model.transformer, conditioner.encode(prompts), batch_size)
    drawn_BNC = torch.empty_like(x_BNC)
    for rows, text in even(model.transformer, batches):
        x = x_BNC[rows]
        for sigma, s, s_next in zip(levels, levels.tolist(), levels.tolist()[1:], strict=False):
            v = velocity(model.transformer, x, sigma, text, grid)
            if empty is not None:
                unconditional = empty.expand(len(rows), -1, -1)
                v = v + guidance * (v - velocity(model.transformer, x, sigma, unconditional, grid))
            x = euler_step(x, v, s, s_next)
            done += len(rows)
            if progress is not None:
                progress(min(done, len(prompts) * steps), len(prompts) * steps)
        drawn_BNC[rows] = x
    return drawn_BNC
