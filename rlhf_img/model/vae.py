"""Between images and packed latents: the Qwen-Image autoencoder on single frames, as the stock pipeline uses it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from jaxtyping import Float
from torch import Tensor

from rlhf_img.model.loading import Model


def pack(latents_BCHW: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N D"]:
    """Patches of a latent image as tokens, row by row: N = (H / p) (W / p), D = C p p with the channel slowest."""
    B, C, H, W = latents_BCHW.shape
    p = patch_size
    patches = latents_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, (H // p) * (W // p), C * p * p)


def unpack(x_BND: Float[Tensor, "B N D"], grid: tuple[int, int], patch_size: int) -> Float[Tensor, "B C H W"]:
    """The inverse of `pack`; `grid` is (rows, columns) in patches."""
    B, _, D = x_BND.shape
    (h, w), p = grid, patch_size
    patches = x_BND.reshape(B, h, w, D // (p * p), p, p).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, D // (p * p), h * p, w * p)


def at_once(height: int, width: int) -> int:
    """Images that go through the autoencoder together: 64 up to 181 px, 2 at 1024 px."""
    return max(1, min(64, 2**21 // (height * width)))


def _last_tap(conv: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """A causal 3-d convolution of one frame: every temporal tap but the last falls on the zeros before it."""
    if x.shape[2] != 1 or cache_x is not None:
        raise ValueError(f"single_frame is for one frame without history; got {x.shape[2]} frames")
    left, _, top, _ = conv._padding[:4]
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left))[:, :, None]


@contextmanager
def single_frame(vae: AutoencoderKLQwenImage) -> Iterator[AutoencoderKLQwenImage]:
    """Inside, `vae` encodes and decodes one-frame inputs with 2-d convolutions: the same values, about 3 times cheaper.

    Works under autograd (on one frame only the last temporal tap has a gradient that is not zero) and may be nested.
    A longer video raises ValueError.
    """
    convs = [m for m in vae.modules() if isinstance(m, QwenImageCausalConv3d) and "forward" not in vars(m)]
    for conv in convs:
        conv.forward = MethodType(_last_tap, conv)
    try:
        yield vae
    finally:
        for conv in convs:
            del conv.forward


def _statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the latents, each (C, 1, 1), in the autoencoder's dtype."""
    like = next(vae.parameters())
    mean, std = (like.new_tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


def decode(
    model: Model, latents_BNC: Float[Tensor, "B N C"], height: int, width: int, *, batch_size: int | None = None
) -> Float[Tensor, "B 3 H W"]:
    """Images, float32 RGB in [0, 1], of packed normalised latents.

    `height` and `width` are in pixels, multiples of the model's token size; `batch_size` bounds the memory, not the
    result, and is `at_once` by default. Differentiable where gradients are on.
    """
    vae, grid = model.vae, model.grid(height, width)
    batch_size = batch_size or at_once(height, width)

    def one(latents: Tensor) -> Tensor:
        mean, std = _statistics(vae)
        z = unpack(latents, grid, model.patch_size).to(mean) * std + mean
        # Without the stock decode's feature cache, which would only keep a copy of every activation for a next frame.
        frame = vae.decoder(vae.post_quant_conv(z[:, :, None]))[:, :, 0]
        return (frame.float() / 2 + 0.5).clamp(0, 1)

    with model.present(vae), single_frame(vae):
        return torch.cat([one(part) for part in torch.split(latents_BNC, batch_size)])


def encode(model: Model, images: Float[Tensor, "B 3 H W"], *, batch_size: int | None = None) -> Float[Tensor, "B N C"]:
    """Packed normalised float32 latents (the posterior's mean) of float RGB images in [0, 1]."""
    vae, (height, width) = model.vae, images.shape[-2:]
    model.grid(height, width)
    batch_size = batch_size or at_once(height, width)

    def one(part: Tensor) -> Tensor:
        mean, std = _statistics(vae)
        moments = vae.quant_conv(vae.encoder((part.to(mean) * 2 - 1)[:, :, None]))[:, :, 0]
        return pack((moments.chunk(2, dim=1)[0] - mean) / std, model.patch_size).float()

    with model.present(vae), single_frame(vae):
        return torch.cat([one(part) for part in torch.split(images, batch_size)])


def reconstruct(model: Model, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """What the autoencoder makes of float RGB images in [0, 1]: encoded and decoded again."""
    return decode(model, encode(model, images_B3HW), images_B3HW.shape[-2], images_B3HW.shape[-1])
