"""The velocity of a Krea 2 without padding or masks, on the stock module's own blocks.

What the stock forward spends and this one does not: text padded to 512 tokens and fused at every step, key/value heads
repeated, rotary tables rebuilt at every step, and a time embedding per image although a step has one time.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2RotaryPosEmbed
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

SHARDED = "sharded_velocity"
"""The method of a sharded transformer by which FSDP is told that a forward begins and ends: `sharded_velocity`."""


@lru_cache(maxsize=256)
def rotary_tables(
    theta: float, axes: tuple[int, ...], text_len: int, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # else a table made while sampling could not be trained with
        positions = Krea2Pipeline.prepare_position_ids(text_len, *grid, device)
        return Krea2RotaryPosEmbed(theta, list(axes))(positions)


def fuse_text(transformer: Krea2Transformer2DModel, hidden_BLTE: Float[Tensor, "B L T E"]) -> Float[Tensor, "B L D"]:
    """The text as the blocks read it, from T tapped encoder states of unpadded prompts; it does not depend on sigma."""
    return transformer.txt_in(transformer.text_fusion(hidden_BLTE.to(transformer.img_in.weight.dtype)))


def velocity(
    transformer: Krea2Transformer2DModel,
    x_BNC: Float[Tensor, "B N C"],
    sigma_B: Float[Tensor, "..."],
    text_BLD: Float[Tensor, "B L D"],
    grid: tuple[int, int],
) -> Float[Tensor, "B N C"]:
    """v = eps - x0 at noise level sigma, in the dtype of `x_BNC`; the transformer computes in its own, and so do its
    LoRA layers, whose float32 weights are rounded on the way (autocast).

    Args:
        x_BNC: packed noisy latents; N = rows * columns of `grid`.
        sigma_B: noise level in [0, 1], 1 = noise: one element if all images share it (cheaper), else B.
        text_BLD: fused text (`fuse_text`, or `Conditioner.encode`) of unpadded prompts of one length.
        grid: rows and columns of image tokens.

    Gradients reach the transformer's parameters and active LoRA layers, through its gradient checkpointing if that is
    on. Equal to the stock module with padding and mask up to rounding. Raises ValueError where shapes do not fit.
    """
    B, N, _ = x_BNC.shape
    if grid[0] * grid[1] != N or sigma_B.numel() not in (1, B) or text_BLD.shape[0] != B:
        raise ValueError(
            f"{B} images of {N} tokens do not fit the grid {grid}, {sigma_B.numel()} sigmas or {len(text_BLD)} texts"
        )
    weight = transformer.img_in.weight
    with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
        if isinstance(transformer, FSDPModule):
            v_BNC: Tensor = getattr(transformer, SHARDED)(x_BNC, sigma_B, text_BLD, grid)
        else:
            v_BNC = _velocity(transformer, x_BNC, sigma_B, text_BLD, grid)
        return v_BNC.to(x_BNC.dtype)


def sharded_velocity(
    transformer: Krea2Transformer2DModel, x_BNC: Tensor, sigma_B: Tensor, text_BLD: Tensor, grid: tuple[int, int]
) -> Tensor:
    """What `velocity` computes, as FSDP calls it; a copy, since it warns of a view, whose hooks can get lost."""
    return _velocity(transformer, x_BNC, sigma_B, text_BLD, grid).clone()


def _velocity(
    transformer: Krea2Transformer2DModel, x_BNC: Tensor, sigma_B: Tensor, text_BLD: Tensor, grid: tuple[int, int]
) -> Tensor:
    weight = transformer.img_in.weight
    temb = transformer.time_embed(sigma_B.reshape(-1).to(weight.device), dtype=weight.dtype)
    modulation = transformer.time_mod_proj(F.gelu(temb, approximate="tanh"))
    rope = transformer.rotary_emb
    rotary = rotary_tables(float(rope.theta), tuple(rope.axes_dim), text_BLD.shape[1], tuple(grid), weight.device)

    hidden = torch.cat([text_BLD.to(weight.dtype), transformer.img_in(x_BNC.to(weight.dtype))], dim=1)
    for block in transformer.transformer_blocks:
        if transformer.gradient_checkpointing and torch.is_grad_enabled():
            hidden = transformer._gradient_checkpointing_func(block, hidden, modulation, rotary, None)
        else:
            hidden = block(hidden, modulation, rotary, None)
    return transformer.final_layer(hidden[:, -x_BNC.shape[1] :], temb)


def by_length(texts: Sequence[Float[Tensor, "_ *D"]]) -> list[tuple[list[int], Float[Tensor, "_ _ *D"]]]:
    """Texts (L, D) of equal L stacked to (B, L, D), shortest first, each with the places its rows had in `texts`."""
    return [(rows, torch.stack([texts[i] for i in rows])) for rows in _alike(texts)]


def in_batches(
    transformer: Krea2Transformer2DModel, texts: Sequence[Float[Tensor, "_ *D"]], size: int, group: int = 1
) -> list[tuple[list[int], Float[Tensor, "_ _ *D"]]]:
    """Texts (L, D) of equal L in batches of at most `size`, each with the places its rows had in `texts`.

    Of a sharded transformer every `group` of texts, of one prompt, is by itself. So processes with as many groups run
    it equally often whatever their prompts, as they must. That costs little: what is sharded is large, so that few
    images fill a device, and few prompts have one length.
    """
    if isinstance(transformer, FSDPModule):
        alike = [list(range(first, first + group)) for first in range(0, len(texts), group)]
    else:
        alike = _alike(texts)
    parts = [rows[first : first + size] for rows in alike for first in range(0, len(rows), size)]
    return [(rows, torch.stack([texts[i] for i in rows])) for rows in parts]


def _alike(texts: Sequence[Tensor]) -> list[list[int]]:
    """The places of texts of equal length, shortest first."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        places[len(text)].append(place)
    return [rows for _, rows in sorted(places.items())]


def velocity_mixed(
    transformer: Krea2Transformer2DModel,
    x_BNC: Float[Tensor, "B N C"],
    sigma_B: Float[Tensor, "..."],
    texts: Sequence[Float[Tensor, "_ D"]],
    grid: tuple[int, int],
) -> Float[Tensor, "B N C"]:
    """`velocity` of a batch whose prompts have different lengths: one forward a length, rows in the order given."""
    groups = by_length(texts)
    if len(groups) == 1:
        return velocity(transformer, x_BNC, sigma_B, groups[0][1], grid)
    order = torch.tensor([i for rows, _ in groups for i in rows], device=x_BNC.device)
    parts = [
        velocity(transformer, x_BNC[rows], sigma_B if sigma_B.numel() == 1 else sigma_B[rows], text_BLD, grid)
        for rows, text_BLD in groups
    ]
    return torch.cat(parts)[order.argsort()]
