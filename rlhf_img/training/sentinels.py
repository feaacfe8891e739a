"""Cheap statistics of images that no reward sees; a reward that is being hacked shows here first.

Each is a mean over images in [0, 1], RGB, (B, 3, H, W). Evidence for their use: rising OCR reward with dark share
0.45 -> 0.93 and edge density -60 % (UniRL pull request 407), grids on faces (flow_grpo issue 233).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def image_statistics(images_B3HW: Float[Tensor, "B 3 H W"]) -> dict[str, float]:
    """Saturation, dark share, edge density, and the share of spectral energy in the finest third of frequencies."""
    x = images_B3HW.float()
    grey = x.mean(1)
    edges = grey.diff(dim=1)[:, :, 1:].abs() + grey.diff(dim=2)[:, 1:].abs()
    return {
        "saturation": float((x.amax(1) - x.amin(1)).mean()),
        "dark_share": float((grey < 0.15).float().mean()),
        "edge_density": float((edges > 0.1).float().mean()),
        "high_freq": float(_high_frequency_share(grey)),
    }


def _high_frequency_share(grey_BHW: Tensor) -> Tensor:
    centred = grey_BHW - grey_BHW.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred).abs().square()
    fy, fx = (torch.fft.fftfreq(n, device=grey_BHW.device).abs() for n in grey_BHW.shape[1:])
    high = torch.maximum(fy[:, None], fx[None, :]) > 1 / 3
    return (power[:, high].sum(1) / power.sum((1, 2)).clamp_min(1e-8)).mean()


def high_frequency_energy(images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Variance of the brightness at radial frequencies above 1/3 cycle a pixel: fine grids, noise, hard edges.

    In absolute units, unlike the share `high_freq`, which also moves with what an image shows at large.
    """
    grey = images_B3HW.float().mean(1)
    power = torch.fft.fft2(grey).abs().square() / grey[0].numel() ** 2
    fy, fx = (torch.fft.fftfreq(n, device=grey.device) for n in grey.shape[1:])
    return power[:, torch.hypot(fy[:, None], fx[None, :]) > 1 / 3].sum(1)


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
