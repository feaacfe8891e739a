"""Looks that are no defects: grain, softness, vignette, exposure, and what a VAE and a small diffusion model leave."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_REACH = 6
"""Half the width of the blur kernel in pixels: enough for a sigma of 2.4."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look for each image of a batch; the same look can be given to the clean and the damaged twin.

    Strengths in units of image range [0, 1], except `blur_B`: a standard deviation in pixels.
    """

    gain_B3: Tensor
    offset_B3: Tensor
    blur_B: Tensor
    sharpen_B: Tensor
    mottle_B3HW: Tensor
    vignette_B: Tensor
    noise_B3HW: Tensor
    grain_B: Tensor

    def __call__(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """The images in this look, rounded to 8 bits."""
        x = images_B3HW * self.gain_B3[..., None, None] + self.offset_B3[..., None, None] + self.mottle_B3HW
        x = gaussian_blur(x, self.blur_B)
        sharp = self.sharpen_B > 0
        soft = gaussian_blur(x, sharp.float())
        x = x + self.sharpen_B[:, None, None, None] * (x - soft)
        x = x * _shade(x, self.vignette_B) + self.noise_B3HW
        return x.clamp(0, 1).mul(255).round().div(255)


def random_look(batch: int, side: int, generator: torch.Generator) -> Look:
    """Looks as strong as prompts may ask for, and mild ones that nobody asks for."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    def sometimes(share: float, values: Tensor) -> Tensor:
        return torch.where(torch.rand(batch, generator=generator) < share, values, torch.zeros(()))

    soft = sometimes(0.3, uniform(1.0, 2.2))
    blur = torch.where(soft > 0, soft, sometimes(0.6, uniform(0.2, 1.0)))
    grain = sometimes(0.25, uniform(6, 22) / 255)
    mono = torch.randn(batch, 1, side, side, generator=generator) * grain[:, None, None, None]
    hiss = sometimes(0.3, uniform(0.5, 3) / 255)[:, None, None, None]
    coarse = torch.randn(batch, 3, side // 8, side // 8, generator=generator)
    mottle = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return Look(
        gain_B3=uniform(0.94, 1.06, 3) * uniform(0.92, 1.06, 1),
        offset_B3=uniform(-0.03, 0.03, 3),
        blur_B=blur,
        sharpen_B=sometimes(0.3, uniform(0.1, 0.7)),
        mottle_B3HW=mottle * sometimes(0.3, uniform(0.002, 0.015))[:, None, None, None],
        vignette_B=sometimes(0.25, uniform(0.2, 0.75)),
        noise_B3HW=mono + torch.randn(batch, 3, side, side, generator=generator) * hiss,
        grain_B=grain,
    )


def gaussian_blur(x_B3HW: Float[Tensor, "B 3 H W"], sigma_B: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Each image blurred with its own standard deviation in pixels; 0 leaves it as it is."""
    blurred = sigma_B > 0
    if not blurred.all():
        out = x_B3HW.clone()
        if blurred.any():
            out[blurred] = gaussian_blur(x_B3HW[blurred], sigma_B[blurred])
        return out
    batch, channels, height, width = x_B3HW.shape
    reach = torch.arange(-_REACH, _REACH + 1)
    kernel = torch.exp(-0.5 * (reach / sigma_B[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, 0)
    x = F.pad(x_B3HW, (_REACH,) * 4, mode="replicate").reshape(1, batch * channels, height + 2 * _REACH, -1)
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=batch * channels).reshape(batch, channels, height, width)


def _shade(x_B3HW: Tensor, strength_B: Tensor) -> Tensor:
    height, width = x_B3HW.shape[-2:]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return 1 - strength_B[:, None, None, None] * ((torch.hypot(x, y) - 0.7) / 0.7).clamp(0, 1)
