"""Naming colours: the nearest named colour in CIELAB, with how clearly it is the nearest."""

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

from rlhf_img.rubrics.lexicon import COLOR_SYNONYMS, COLORS, FINE_COLORS

_SHADES_INTO = 35.0
"""CIELAB distance below which a fine colour does not compete with a basic one (gold with yellow)."""

Lab = npt.NDArray[np.float64]


def to_lab(rgb: Sequence[float] | npt.NDArray[np.floating]) -> Lab:
    """CIELAB (D65; L in [0, 100]) of one 8-bit sRGB colour."""
    pixel = np.clip(np.asarray(rgb, np.float32).reshape(1, 1, 3) / 255, 0, 1)
    return np.asarray(cv2.cvtColor(pixel, cv2.COLOR_RGB2LAB)[0, 0], np.float64)


@cache
def _basic() -> tuple[tuple[str, ...], Lab]:
    return tuple(COLORS), np.stack([to_lab(rgb) for rgb in COLORS.values()])


def name_of(rgb: Sequence[float] | npt.NDArray[np.floating]) -> str:
    """The nearest basic colour."""
    names, labs = _basic()
    return names[int(np.linalg.norm(labs - to_lab(rgb), axis=1).argmin())]


def knows(color: str) -> bool:
    """Whether `color` is a colour name of the lexicon."""
    color = COLOR_SYNONYMS.get(color, color)
    return color in COLORS or color in FINE_COLORS


def color_score(rgb: Sequence[float], color: str) -> float:
    """How clearly `rgb` (8 bit) is `color`, in [0, 1]: 1 at the colour itself, 0.5 half-way to the nearest other one.

    Raises KeyError for a name that `knows` denies.
    """
    color = COLOR_SYNONYMS.get(color, color)
    names, labs = _basic()
    lab = to_lab(rgb)
    wanted = to_lab(COLORS.get(color) or FINE_COLORS[color])
    apart = np.linalg.norm(labs - wanted, axis=1)
    rivals = labs[[n != color and (color in COLORS or d > _SHADES_INTO) for n, d in zip(names, apart, strict=True)]]
    near, far = float(np.linalg.norm(lab - wanted)), float(np.linalg.norm(rivals - lab, axis=1).min())
    return far / (near + far) if near + far > 0 else 0.5
