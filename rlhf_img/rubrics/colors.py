"""Naming colours: the nearest named colour in CIELAB, with how clearly it is the nearest."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from rlhf_img.rubrics.lexicon import COLOR_SYNONYMS, COLORS, FINE_COLORS

_SHADES_INTO = 35.0
"""CIELAB distance below which a fine colour does not compete with a basic one (gold with yellow)."""

Lab = npt.NDArray[np.float64]
Rgb = Sequence[float] | npt.NDArray[np.floating]


_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = _TO_XYZ.sum(1)


def to_lab(rgb: Rgb) -> Lab:
    """CIELAB (D65; L in [0, 100]) of 8-bit sRGB. Own lines because skimage's conversion costs 0.1 ms a colour."""
    value = np.clip(np.asarray(rgb, np.float64) / 255, 0, 1)
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = _TO_XYZ @ linear / _WHITE
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@cache
def _basic() -> tuple[tuple[str, ...], Lab]:
    return tuple(COLORS), np.stack([to_lab(rgb) for rgb in COLORS.values()])


def name_of(rgb: Rgb) -> str:
    """The nearest basic colour."""
    names, labs = _basic()
    return names[int(np.linalg.norm(labs - to_lab(rgb), axis=1).argmin())]


def knows(color: str) -> bool:
    """Whether `color` is a colour name of the lexicon."""
    color = COLOR_SYNONYMS.get(color, color)
    return color in COLORS or color in FINE_COLORS


def color_score(rgb: Rgb, color: str) -> float:
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
