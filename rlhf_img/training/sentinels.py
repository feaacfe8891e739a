"""Cheap statistics of images that no reward sees; a reward that is being hacked shows here first.

Each is a pure function of RGB images in [0, 1], (B, 3, H, W), with one value an image. Evidence for their use: a rising
OCR reward with dark share 0.45 -> 0.93, edge density -60 % and colour entropy -54 % (UniRL pull request 407), and grids
on faces (flow_grpo issues 204 and 233, DanceGRPO issue 36).
"""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rlhf_img.rewards import Images
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics.vision import analyze
from rlhf_img.training.prompts import Prompt

_JPEG_QUALITY = 85
_LEVELS = 8
"""Of each channel, in the colours that are counted."""
_CLEARLY = 0.25
"""Spreads of Raw by which an image must have changed to count as changed."""
LEAST_GAIN = 0.2
"""Spreads by which trained rewards must have risen for a ratio to them."""


def image_statistics(images: Images, period: int) -> dict[str, Float[Tensor, " B"]]:
    """Every statistic below of each image. `period`: pixels between two tokens of the transformer."""
    x = images.tensor.float()
    return {
        "saturation": saturation(x),
        "dark_share": dark_share(x),
        "edge_density": edge_density(x),
        "colour_entropy": colour_entropy(x),
        "grid": grid_energy(x, period),
        "high_freq": high_frequency_energy(x),
        "jpeg": jpeg_bits(images),
    }


def saturation(images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Mean over pixels of the largest channel less the smallest: 0 is grey, 1 pure colour everywhere."""
    return (images_B3HW.amax(1) - images_B3HW.amin(1)).mean((1, 2))


def dark_share(images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Share of pixels whose brightness (mean of the channels) is below 0.15."""
    return (images_B3HW.mean(1) < 0.15).float().mean((1, 2))


def edge_density(images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Share of pixels that differ from the pixels above and to the left by more than 0.1 of brightness together."""
    grey = images_B3HW.mean(1)
    edges = grey.diff(dim=1)[:, :, 1:].abs() + grey.diff(dim=2)[:, 1:].abs()
    return (edges > 0.1).float().mean((1, 2))


def colour_entropy(images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Shannon entropy in bits of an image's colours, at 8 levels a channel: 0 is one colour, 9 all 512 alike."""
    levels = (images_B3HW * _LEVELS).long().clamp(0, _LEVELS - 1)
    colours_BN = (levels[:, 0] * _LEVELS**2 + levels[:, 1] * _LEVELS + levels[:, 2]).flatten(1)
    counts = torch.stack([torch.bincount(row, minlength=_LEVELS**3) for row in colours_BN])
    return torch.special.entr(counts / colours_BN.shape[1]).sum(1) / torch.log(torch.tensor(2.0))


def grid_energy(images_B3HW: Float[Tensor, "B 3 H W"], period: int) -> Float[Tensor, " B"]:
    """log10 of the spectral power at multiples of 1 / period over that half-way between them; 0: no grid.

    The frequencies of a pattern that repeats with the tokens, and so those of the autoencoder's cells too, whose
    period is a part of the tokens'. Sides are cut to a multiple of the period. NaN if fewer than 3 periods fit.
    """
    grey = images_B3HW.mean(1)
    rows, columns = (side // period for side in grey.shape[1:])
    if min(rows, columns) < 3:
        return torch.full((len(grey),), torch.nan)
    grey = grey[:, : rows * period, : columns * period]
    window = torch.outer(*(torch.hann_window(n, device=grey.device) for n in grey.shape[1:]))
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square()
    on, between = power[:, ::rows, ::columns], power[:, rows // 2 :: rows, columns // 2 :: columns]
    tiny = 1e-8 * window.sum().square()  # in a flat image rounding would make peaks
    return torch.log10((on.sum((1, 2)) - on[:, 0, 0] + tiny) / (between.sum((1, 2)) + tiny))


def high_frequency_energy(images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Variance of the brightness at radial frequencies above 1/3 cycle a pixel: fine grids, noise, hard edges."""
    grey = images_B3HW.float().mean(1)
    power = torch.fft.fft2(grey).abs().square() / grey[0].numel() ** 2
    fy, fx = (torch.fft.fftfreq(n, device=grey.device) for n in grey.shape[1:])
    return power[:, torch.hypot(fy[:, None], fx[None, :]) > 1 / 3].sum(1)


def jpeg_bits(images: Images) -> Float[Tensor, " B"]:
    """Bits a pixel of the image as JPEG at quality 85: what is empty is small, noise is large."""

    def bits(image: Image.Image) -> float:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
        return 8 * file.tell() / (image.width * image.height)

    return torch.tensor([bits(image) for image in images])


def emptied(jpeg_B: Float[Tensor, " B"], raw_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 where an image is emptier than Raw's of the same prompt and seed, -1 where it is fuller, 0 between.

    By `jpeg_bits`, and by more than a quarter of the spread between Raw's images. The mean is the share of images that
    lost content less the share that gained some. Things vanish from a few images first, when the values of all images
    together are still where Raw's are.
    """
    change = (raw_B - jpeg_B) / raw_B.std(correction=0).clamp_min(1e-8)
    return torch.sign(change) * (change.abs() > _CLEARLY)


def stray_characters(images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, " B"]:
    """Characters that the reader of the check `text` finds in an image and its prompt does not ask for."""

    def count(i: int) -> float:
        requirements = (prompts[i].rubric or rubric_of(prompts[i].text)).requirements
        asked = _characters("".join(str(r.equals) for r in requirements if r.check == "text"))
        return float(sum((_characters(analyze(images.arrays[i]).text[0]) - asked).values()))

    return torch.tensor([count(i) for i in range(len(images))])


def _characters(text: str) -> "Counter[str]":
    return Counter(sign.casefold() for sign in text if sign.isalnum())


def diversity(images_PG3HW: Float[Tensor, "P G 3 H W"]) -> Float[Tensor, " P"]:
    """Mean distance between two images of a prompt: RMS over an 8 x 8 average of each, in [0, 1].

    Averaging leaves what and where, and takes out grain, which would otherwise count as variety.
    """
    p, g = images_PG3HW.shape[:2]
    small = torch.nn.functional.adaptive_avg_pool2d(images_PG3HW.float().flatten(0, 1), 8).reshape(p, g, -1)
    apart = torch.cdist(small, small) / small.shape[2] ** 0.5
    return apart.sum((1, 2)) / (g * (g - 1))


def distance(one_B3HW: Float[Tensor, "B 3 H W"], other_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Between images in pairs, as `diversity` measures it."""
    return diversity(torch.stack([one_B3HW, other_B3HW], 1))


def place(now_N: Float[Tensor, " N"], raw_M: Float[Tensor, " M"]) -> float:
    """The share of Raw's values that lie below one of now, equal ones half: 0.5 is as Raw, 1 above all of them.

    The statistic of Mann and Whitney (1947) as a share, which no rescaling of the values changes. NaN values are left
    out; NaN if nothing is left.
    """
    now, raw = now_N[~now_N.isnan()], raw_M[~raw_M.isnan()]
    signs = torch.sign(now[:, None] - raw[None, :])
    return float(signs.mean() / 2 + 0.5)


def chance(now: int, raw: int) -> float:
    """Standard deviation of `place` where nothing has changed, for so many values of each (Mann and Whitney, 1947)."""
    return ((now + raw + 1) / (12 * now * raw)) ** 0.5


def transfer(
    gains: Mapping[str, float], trained_on: Sequence[str], held_out: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """The mean gain of the rewards trained on, and the gain of each held-out reward over it: the transfer ratio.

    gains: of every reward, from Raw on, in units of its spread over Raw's images. Where the mean gain is below
    LEAST_GAIN, there is nothing to divide by, and no ratio.
    """
    known = {name: gain for name, gain in gains.items() if not math.isnan(gain)}
    trained = [known[name] for name in trained_on if name in known]
    gain = sum(trained) / len(trained) if trained else math.nan
    if not gain >= LEAST_GAIN:
        return gain, {}
    return gain, {name: known[name] / gain for name in held_out if name in known}
