"""Images as features, how far two sets of images are apart, and whether two changes are alike."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.artifact_model import load_detector
from rlhf_img.rewards.backbones import open_backbone

Features = Callable[[Tensor], np.ndarray]
"""Images (B, 3, H, W) in [0, 1] -> (B, D): what is in an image and what it looks like, wherever it is."""
ARTIFACT = "artifact"
_EXCHANGES = 200


def open_features(name: str = ARTIFACT) -> Features:
    """Means and deviations, over an image, of what a network sees in its places.

    name: "artifact", the small network of the artifact reward, for images of 32 to 128 px; or a hub id or folder of
    SigLIP or DINO for any. Raises RlhfImgError for another one, or for images that it was not made for.
    """
    if name == ARTIFACT:
        detector = load_detector()
        embed, side = detector.net.embed, detector.side
    else:
        embed, side = open_backbone(name).features, None

    @torch.no_grad()
    def features(images_B3HW: Tensor) -> np.ndarray:
        size = images_B3HW.shape[-2:]
        if side is not None and not side / 2 <= min(size) <= max(size) <= 2 * side:
            raise RlhfImgError(f"the features of the artifact reward are made for {side} px, and images have "
                               f"{size[1]} x {size[0]}: give --features facebook/dinov2-small or another backbone")
        found = []
        for part in images_B3HW.float().split(64):
            places = embed(part).float().flatten(2)
            found.append(torch.cat([places.mean(2), places.std(2)], 1).cpu())
        return torch.cat(found).double().numpy()

    return features


def energy_distance(one_BD: np.ndarray, other_BD: np.ndarray) -> dict[str, float]:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two laws (Szekely and Rizzo, 2013), 0 where they are the same.

    Row i of both is of the same prompt, and the expectations are over different prompts. Each feature is divided by its
    deviation in `other`. `chance` is what 95 of 100 random exchanges of rows between the two sets stay below: a
    distance above it is no accident of the sample.
    """
    spread = other_BD.std(0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    both = torch.from_numpy(np.stack([one_BD, other_BD]) / scale)
    apart = torch.cdist(both[:, None], both[None]).numpy()  # (2, 2, B, B)
    rng, count = np.random.default_rng(0), len(one_BD)
    exchanged = [_energy(apart, rng.random(count) < 0.5) for _ in range(_EXCHANGES)]
    return {"value": _energy(apart, np.zeros(count, bool)), "chance": float(np.quantile(exchanged, 0.95))}


def _energy(apart: np.ndarray, swapped: np.ndarray) -> float:
    one, other, rows = swapped.astype(int), 1 - swapped.astype(int), np.arange(len(swapped))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        picked = apart[a[:, None], b[None, :], rows[:, None], rows[None, :]]
        return float((picked.sum() - np.trace(picked)) / (len(rows) * (len(rows) - 1)))

    return 2 * mean(one, other) - mean(one, one) - mean(other, other)


def alike(one_BD: np.ndarray, other_BD: np.ndarray, resamples: int = 1000) -> dict[str, Any]:
    """Whether two changes of the features of B images go the same way, and how far the second goes.

    `cosine`: of the two mean changes, which is the effect without what it does to a single image by accident;
    `cosine_each`: the mean over images of their own; `magnitude`: the second mean change's length over the first's.
    Each with a 95 % bootstrap interval over images.
    """
    rows = np.random.default_rng(0).integers(len(one_BD), size=(resamples, len(one_BD)))
    ones, others = (np.stack([x[r].mean(0) for r in rows]) for x in (one_BD, other_BD))
    one, other = one_BD.mean(0), other_BD.mean(0)
    each = _cosine(one_BD, other_BD)
    known = each[~np.isnan(each)]
    return {
        "cosine": _with_interval(float(_cosine(one, other)), _cosine(ones, others), len(one_BD)),
        "cosine_each": _with_interval(
            float(known.mean()) if known.size else np.nan,
            known[np.random.default_rng(0).integers(known.size, size=(resamples, known.size))].mean(1)
            if known.size else known, int(known.size),
        ),
        "magnitude": _with_interval(_ratio(_length(other), _length(one)), _ratio(_length(others), _length(ones)),
                                    len(one_BD)),
    }  # fmt: skip


def _length(x: np.ndarray) -> Any:
    return np.linalg.norm(x, axis=-1)


def _ratio(top: Any, bottom: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


def _cosine(one: np.ndarray, other: np.ndarray) -> Any:
    return _ratio((one * other).sum(-1), _length(one) * _length(other))


def _with_interval(value: Any, samples: np.ndarray, n: int) -> dict[str, float | int | None]:
    known = samples[~np.isnan(samples)]
    if np.isnan(value) or not known.size:
        return {"mean": None, "low": None, "high": None, "n": n}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"mean": float(value), "low": float(low), "high": float(high), "n": n}


def colours(images_B3HW: Float[Tensor, "B 3 H W"]) -> dict[str, list[float]]:
    """Brightness, contrast and saturation of each image, in [0, 1]: what a distillation lets drift first."""
    x = images_B3HW.float()
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    return {
        "brightness": luma.mean((1, 2)).tolist(), "contrast": luma.std((1, 2)).tolist(),
        "saturation": (x.amax(1) - x.amin(1)).mean((1, 2)).tolist(),
    }  # fmt: skip
