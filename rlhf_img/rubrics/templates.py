"""Which shape a patch is: unit outlines laid over it at its own place and size, blurred as the image is."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Array = npt.NDArray[np.floating]
_OVERSAMPLE = 4
_GOOD, _BAD = 0.90, 0.66
"""Overlap (soft intersection over union) at which a patch surely is, and surely is not, the shape."""
_CLEAR = 0.10
"""Lead in overlap over the next shape at which there is no doubt between the two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A template on a patch: soft intersection over union, and centre and nominal radius in pixels of the crop."""

    overlap: float
    x: float
    y: float
    radius: float


def _circle() -> Array:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def _star() -> Array:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    reach = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
    return np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1).astype(np.float32)


def _cross(arm: float = 0.36) -> Array:
    a, b = 1.0, arm
    turns = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
    return np.array(turns, np.float32)


OUTLINES: dict[str, Array] = {
    "circle": _circle(),
    # the half side of a square with the area of the unit circle
    "square": 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float32),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)], np.float32),
    "star": _star(),
    "cross": _cross(),
}
"""Corners of each shape at nominal radius 1, y downwards."""


def _moments(outline: Array) -> tuple[float, float, float]:
    """Area and centre of mass of a polygon (the shoelace formulas)."""
    x, y = outline.T.astype(float)
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    cross = x * next_y - next_x * y
    area = cross.sum() / 2
    return abs(area), ((x + next_x) * cross).sum() / (6 * area), ((y + next_y) * cross).sum() / (6 * area)


_MOMENTS = {shape: _moments(outline) for shape, outline in OUTLINES.items()}


def fit(alpha: Array, blur: float) -> dict[str, Fit]:
    """Lay every shape over a patch.

    Args:
        alpha: (h, w) in [0, 1], how much of each pixel the patch covers.
        blur: standard deviation in pixels of the image's blur.
    """
    area = float(alpha.sum())
    y, x = (float((alpha.sum(axis) * np.arange(alpha.shape[1 - axis])).sum()) / area + 0.5 for axis in (1, 0))
    return {shape: _fit_one(alpha, shape, area, x, y, blur) for shape in OUTLINES}


def _fit_one(alpha: Array, shape: str, area: float, x: float, y: float, blur: float) -> Fit:
    unit_area, _, _ = _MOMENTS[shape]
    radius = float(np.sqrt(area / unit_area))
    drawn, center = _blurred(shape, radius, x, y, alpha.shape, blur)
    if blur > 1:  # a blurred patch with a normalised core has more area than its outline
        radius *= float(np.sqrt(area / drawn.sum()))
        drawn, center = _blurred(shape, radius, x, y, alpha.shape, blur)
    overlap = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
    return Fit(overlap=overlap, x=center[0], y=center[1], radius=radius)


def core_level(values: Array) -> float:
    """The level from which pixels of a patch count as its core, whose median is taken for its full strength."""
    return 0.9 * float(np.percentile(values, 85))


def _blurred(
    shape: str, radius: float, x: float, y: float, size: tuple[int, ...], blur: float
) -> tuple[Array, tuple[float, float]]:
    """The shape with its centre of mass at x, y, blurred and then scaled as a patch is: its core at 1."""
    _, cx, cy = _MOMENTS[shape]
    center = x - cx * radius, y - cy * radius
    drawn = _draw(OUTLINES[shape] * radius + center, size)
    if blur > 0.45:
        rows, columns = (_blur_matrix(n, round(blur, 1)) for n in size)
        drawn = rows @ drawn @ columns
    if blur > 1:
        inside = drawn[drawn > 0.5 * drawn.max()]
        drawn = np.minimum(drawn / np.float32(np.median(inside[inside >= core_level(inside)])), 1)
    return drawn, center


def _draw(corners: npt.NDArray[np.floating], size: tuple[int, ...]) -> Array:
    """An antialiased polygon, (h, w) in [0, 1]."""
    height, width = size
    canvas = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    # Pillow counts the pixels on the outline in: half a pixel less on each side keeps the area
    points = corners * _OVERSAMPLE - 0.5
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLE), np.float32) / 255


@lru_cache(maxsize=512)
def _blur_matrix(size: int, sigma: float) -> Array:
    """(size, size): multiplied from the left and the right it is a Gaussian blur over black surroundings."""
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    total = np.exp(-0.5 * (np.arange(-40, 41) / sigma) ** 2).sum()
    return np.asarray(weights / total, np.float32)


def scores(fits: dict[str, Fit]) -> dict[str, float]:
    """Each shape's score in [0, 1]: how well it fits, and by how much it leads. At most one is 0.5 or more."""
    result = {}
    for shape, mine in fits.items():
        rival = max(f.overlap for other, f in fits.items() if other != shape)
        quality = (mine.overlap - _BAD) / (_GOOD - _BAD)
        lead = 0.5 + 0.5 * (mine.overlap - rival) / _CLEAR
        result[shape] = float(np.clip(min(quality, lead), 0, 1))
    return result
