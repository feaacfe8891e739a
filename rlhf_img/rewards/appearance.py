"""Looks that are no defects: grain, softness, vignette, tone, JPEG, what a VAE and a small diffusion model leave."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

_REACH = 6
"""Half the width of the blur kernel in pixels: enough for a sigma of 2.4. Wider blurs get a wider kernel."""

STYLES: dict[str, tuple[float, float, float]] = {
    "blur": (0.75, 1.5, 2.2),
    "depth blur": (1.0, 2.0, 3.0),
    "grain": (6 / 255, 14 / 255, 22 / 255),
    "vignette": (0.25, 0.5, 0.75),
    "tone": (0.1, 0.2, 0.3),
    "JPEG": (75.0, 40.0, 15.0),
}
"""What photographs are measured in: standard deviations in 64ths of 1 px times the side (blurs), in image range
(grain), darkening of the corners, change of exposure, JPEG quality."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look for each image of a batch; the same look can be given to the clean and the damaged twin.

    Strengths in units of image range [0, 1], except `blur_B` and `depth_blur_B`: standard deviations in pixels, and
    `jpeg_B`: a quality, of which 0 is none. depth_B1HW: how much of `depth_blur_B` there is at each place, in [0, 1].
    color_noise_B: standard deviation of the coloured part of `noise_B3HW`, where it is more than a hiss.
    """

    gain_B3: Tensor
    offset_B3: Tensor
    blur_B: Tensor
    sharpen_B: Tensor
    mottle_B3HW: Tensor
    vignette_B: Tensor
    noise_B3HW: Tensor
    grain_B: Tensor
    depth_blur_B: Tensor | None = None
    depth_B1HW: Tensor | None = None
    jpeg_B: Tensor | None = None
    color_noise_B: Tensor | None = None

    def __call__(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """The images in this look, rounded to 8 bits."""
        x = images_B3HW * self.gain_B3[..., None, None] + self.offset_B3[..., None, None] + self.mottle_B3HW
        x = gaussian_blur(x, self.blur_B)
        if self.depth_blur_B is not None and self.depth_B1HW is not None:
            x = _blur_by_depth(x, self.depth_blur_B, self.depth_B1HW)
        sharp = self.sharpen_B > 0
        soft = gaussian_blur(x, sharp.float())
        x = x + self.sharpen_B[:, None, None, None] * (x - soft)
        x = x * _shade(x, self.vignette_B) + self.noise_B3HW
        x = x.clamp(0, 1).mul(255).round().div(255)
        return x if self.jpeg_B is None else _jpeg(x, self.jpeg_B)

    def appearance(self) -> Float[Tensor, "B A"]:
        """Which of `defects.APPEARANCES` each image plainly has (1) or has not (0); NaN for what is in between."""
        scale = 64 / self.noise_B3HW.shape[-1]
        none = torch.zeros_like(self.blur_B)
        depth, jpeg, noise = (none if x is None else x for x in (self.depth_blur_B, self.jpeg_B, self.color_noise_B))
        exposure = (self.gain_B3.mean(dim=1) - 1).abs()
        return torch.stack([
            _graded(self.blur_B * scale, 0.5, 1.0),
            _graded(self.grain_B, 4 / 255, 10 / 255),
            _graded(noise, 3 / 255, 8 / 255),
            _graded(depth * scale, 0.5, 1.5),
            _graded(exposure, 0.1, 0.2),
            _graded(torch.where(jpeg > 0, 100 - jpeg, none), 25, 60),
        ], dim=1)


def random_look(batch: int, side: int, generator: torch.Generator) -> Look:
    """Looks as strong as prompts may ask for, and mild ones that nobody asks for."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    def sometimes(share: float, values: Tensor) -> Tensor:
        return torch.where(torch.rand(batch, generator=generator) < share, values, torch.zeros(()))

    soft = sometimes(0.3, uniform(1.0, 2.2))
    blur = torch.where(soft > 0, soft, sometimes(0.6, uniform(0.2, 1.0)))
    grain = sometimes(0.25, uniform(6, 26) / 255)
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
        vignette_B=sometimes(0.35, uniform(0.2, 0.95)),
        noise_B3HW=mono + torch.randn(batch, 3, side, side, generator=generator) * hiss,
        grain_B=grain,
        jpeg_B=sometimes(0.4, uniform(math.log(10), math.log(90)).exp()).round(),
    )


def photo_look(batch: int, side: int, generator: torch.Generator) -> Look:
    """Looks of photographs: those of `random_look`, blurs in proportion to the side, stronger tones, depth, noise."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    look = random_look(batch, side, generator)
    deep = torch.rand(batch, generator=generator) < 0.3
    noisy = torch.where(torch.rand(batch, generator=generator) < 0.15, uniform(8, 20) / 255, torch.zeros(()))
    noise = torch.randn(batch, 3, side, side, generator=generator) * noisy[:, None, None, None]
    return replace(
        look,
        gain_B3=look.gain_B3 * uniform(0.7, 1.25, 1),
        blur_B=look.blur_B * side / 64,
        depth_blur_B=torch.where(deep, uniform(0.7, 3.2), torch.zeros(())) * side / 64,
        depth_B1HW=_depth(batch, side, generator),
        noise_B3HW=look.noise_B3HW + noise,
        color_noise_B=noisy,
    )


def style_look(style: str, strength: float, batch: int, side: int, generator: torch.Generator) -> Look:
    """One of `STYLES` at one strength, and nothing else."""
    zero = torch.zeros(batch)
    look = Look(
        gain_B3=torch.ones(batch, 3), offset_B3=torch.zeros(batch, 3), blur_B=zero, sharpen_B=zero,
        mottle_B3HW=torch.zeros(batch, 3, side, side), vignette_B=zero,
        noise_B3HW=torch.zeros(batch, 3, side, side), grain_B=zero,
    )
    all_of_it = torch.full((batch,), strength)
    match style:
        case "blur":
            return replace(look, blur_B=all_of_it * side / 64)
        case "depth blur":
            return replace(look, depth_blur_B=all_of_it * side / 64, depth_B1HW=_depth(batch, side, generator))
        case "grain":
            noise = torch.randn(batch, 1, side, side, generator=generator).expand(-1, 3, -1, -1) * strength
            return replace(look, noise_B3HW=noise, grain_B=all_of_it)
        case "vignette":
            return replace(look, vignette_B=all_of_it)
        case "tone":  # darker and brighter, with a cast
            sign = torch.randint(0, 2, (batch, 1), generator=generator) * 2 - 1
            cast = (torch.rand(batch, 3, generator=generator) * 2 - 1) * 0.06 * strength / 0.3
            return replace(look, gain_B3=1 + sign * strength + cast)
        case "JPEG":
            return replace(look, jpeg_B=all_of_it)
    raise ValueError(f'no style "{style}"')


def in_every_style(images_B3HW: Float[Tensor, "B 3 H W"], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Images as they are ("no style"), and in each of `STYLES`, "weak", "medium" and "strong"."""
    yield "no style", images_B3HW
    for style, strengths in STYLES.items():
        for level, strength in zip(("weak", "medium", "strong"), strengths, strict=True):
            look = style_look(style, strength, len(images_B3HW), images_B3HW.shape[-1],
                              torch.Generator().manual_seed(seed))
            yield f"{style}, {level}", look(images_B3HW)


def gaussian_blur(x_B3HW: Float[Tensor, "B 3 H W"], sigma_B: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Each image blurred with its own standard deviation in pixels; 0 leaves it as it is."""
    blurred = sigma_B > 0
    if not blurred.all():
        out = x_B3HW.clone()
        if blurred.any():
            out[blurred] = gaussian_blur(x_B3HW[blurred], sigma_B[blurred])
        return out
    batch, channels, height, width = x_B3HW.shape
    half = max(_REACH, math.ceil(2.5 * float(sigma_B.max())))
    reach = torch.arange(-half, half + 1)
    kernel = torch.exp(-0.5 * (reach / sigma_B[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, 0)
    x = F.pad(x_B3HW, (half,) * 4, mode="replicate").reshape(1, batch * channels, height + 2 * half, -1)
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=batch * channels).reshape(batch, channels, height, width)


def _graded(value_B: Tensor, low: float, high: float) -> Tensor:
    """0 up to `low`, 1 from `high`, NaN between."""
    return torch.where(value_B >= high, 1.0, torch.where(value_B <= low, 0.0, torch.nan))


def _shade(x_B3HW: Tensor, strength_B: Tensor) -> Tensor:
    height, width = x_B3HW.shape[-2:]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return 1 - strength_B[:, None, None, None] * ((torch.hypot(x, y) - 0.7) / 0.7).clamp(0, 1)


def _depth(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """How far each place is from the plane in focus, (B, 1, H, W) in [0, 1]: a tilted plane, or away from a point."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    angle, focus_y, focus_x, tilted = torch.rand(4, batch, 1, 1, generator=generator)
    angle, focus_y, focus_x = angle * 2 * torch.pi, focus_y - 0.5, focus_x - 0.5
    plane = (torch.sin(angle) * (y - focus_y) + torch.cos(angle) * (x - focus_x)).abs()
    ball = torch.hypot(y - focus_y, x - focus_x)
    return torch.where(tilted < 0.5, plane, ball).clamp(0, 1)[:, None]


def _blur_by_depth(x_B3HW: Tensor, sigma_B: Tensor, depth_B1HW: Tensor) -> Tensor:
    """From sharp over half the blur to all of it; sharp and blurred mixed directly would look like haze."""
    half, full = gaussian_blur(x_B3HW, sigma_B / 2), gaussian_blur(x_B3HW, sigma_B)
    near = torch.lerp(x_B3HW, half, (2 * depth_B1HW).clamp(max=1))
    return torch.lerp(near, full, (2 * depth_B1HW - 1).clamp(min=0))


def _jpeg(x_B3HW: Tensor, quality_B: Tensor) -> Tensor:
    """Images through JPEG, where the quality is not 0; some cameras halve the colours' resolution, as here."""
    out = x_B3HW.clone()
    for i, quality in enumerate(quality_B.int().tolist()):
        if quality:
            pixels = x_B3HW[i].mul(255).round().byte().permute(1, 2, 0).numpy()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
            with Image.open(file) as back:
                out[i] = torch.from_numpy(np.array(back)).permute(2, 0, 1).float() / 255
    return out
