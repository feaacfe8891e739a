"""Classical vision of simple scenes: flat shapes on an even background, segmented once and shared by all checks.

Works at 64 px on the longer side (larger images are averaged down). The background may be shaded towards the corners,
the whole image blurred or grainy; each is measured, and allowed for before objects are looked at. Shapes are upright.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from rlhf_img.rubrics import lexicon, templates
from rlhf_img.rubrics.colors import name_of

if TYPE_CHECKING:
    from rlhf_img.rubrics.ocr import Line

Array = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the image's width and height."""

SIDE = 64
LARGE = 2 * SIDE
"""Longer side above which an image is no scene of a few shapes with a word, so that text is looked for everywhere."""
_MIN_AREA = 20
"""Pixels below which a spot is dirt, not an object."""
_MIN_CONTRAST = 38.0
"""Distance in 8-bit RGB from the background at which something is there."""
_SQUARE = np.ones((3, 3), bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Thing:
    """One object. `shapes` gives each known shape's score in [0, 1], of which at most one is 0.5 or more.

    `x`, `y` and `radius` are fractions of the longer side; `radius` is that of a circle of the same nominal size.
    """

    rgb: tuple[float, float, float]
    color: str
    box: Box
    x: float
    y: float
    radius: float
    shapes: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """What the image shows. `blur` and `noise` are standard deviations in pixels and 8-bit grey levels;
    `corner_shade` is the brightness of the corners relative to the centre."""

    image: npt.NDArray[np.uint8]
    background: tuple[float, float, float]
    things: tuple[Thing, ...]
    text_box: Box | None
    blur: float | None
    noise: float
    corner_shade: float

    @cached_property
    def lines(self) -> "tuple[Line, ...]":
        """The lines of text in the image; read when first asked for.

        In a small image that is the strip where the vision found writing, in a larger one whatever the reader finds.
        """
        from rlhf_img.rubrics import ocr

        if max(self.image.shape[:2]) > LARGE:
            return ocr.read_lines(self.image)
        if self.text_box is None:
            return ()
        text, confidence = ocr.read(self.image, self.text_box)
        return (ocr.Line(text=text, confidence=confidence, box=self.text_box),)

    @cached_property
    def text(self) -> tuple[str, float]:
        """The words that the image shows, and the least of the reader's confidences in [0, 1]."""
        return " ".join(line.text for line in self.lines), min((line.confidence for line in self.lines), default=1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A connected patch of one colour, in working pixels; `mask` is (height, width)."""

    mask: Mask
    rgb: Array
    left: int
    top: int
    width: int
    height: int
    area: int


def analyze(image: npt.NDArray[np.uint8]) -> Analysis:
    """Find background, objects, text and style.

    Args:
        image: uint8 (H, W, 3), RGB.
    """
    small = _shrink(image)
    height, width = small.shape[:2]
    profile = _corner_profile(small)
    flat = small / profile[..., None]
    background = _background(flat)
    noise = _noise(small, flat, background)
    work = ndimage.gaussian_filter(flat, (0.9, 0.9, 0)) if noise > 5 else flat
    parts = list(_parts(work, background))
    glyphs = _glyphs(parts)
    solid = [p for p in parts if p not in glyphs]
    alphas = _alphas(work, background, parts)
    blur = _blur([alphas[parts.index(p)] for p in solid or parts])
    things = tuple(_thing(p, alphas[parts.index(p)], blur or 0.0, width, height) for p in solid)
    return Analysis(
        image=image,
        background=_rgb(background),
        things=things,
        text_box=_union(glyphs, width, height),
        blur=blur,
        noise=noise,
        corner_shade=float(profile.min()),
    )


def _shrink(image: npt.NDArray[np.uint8]) -> Array:
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    return np.asarray(image, np.float32)


def _corner_profile(image: Array) -> Array:
    """Brightness of the background relative to the centre, (H, W), in (0, 1]: 1 everywhere unless corners are dark.

    A vignette is believed only where all four corners are darker than the inner background, in the same hue.
    """
    height, width = image.shape[:2]
    corners = np.stack([np.median(c.reshape(-1, 3), 0) for c in _corner_patches(image)])
    radius = _radius(height, width)
    inner = image[radius < 0.75]
    # objects may cover most of the middle: only what has the corners' hue can be their background
    hue = corners.sum(0) / max(corners.sum(), 1)
    inner = inner[np.abs(inner / np.maximum(inner.sum(1, keepdims=True), 1) - hue).max(1) < 0.06]
    if len(inner) < 60:
        return np.ones((height, width), np.float32)
    center = _mode(inner)
    ratio = (corners.sum(1) + 6) / (center.sum() + 6)
    if ratio.max() > 0.92 or center.sum() - corners.sum(1).max() < 12:
        return np.ones((height, width), np.float32)
    shade = np.median(ratio)
    # between the inner background and the corner the falloff is close to linear in the distance from the centre
    ramp = np.clip((radius - 0.7) / (1.36 - 0.7), 0, 1.06)
    return np.asarray(np.clip(1 - (1 - shade) * ramp, 0.2, 1), np.float32)


def _corner_patches(image: Array, side: int = 4) -> list[Array]:
    return [image[:side, :side], image[:side, -side:], image[-side:, :side], image[-side:, -side:]]


def _radius(height: int, width: int) -> Array:
    """Distance from the centre, 1 at the middle of an edge, (H, W)."""
    y = (np.arange(height, dtype=np.float32) + 0.5) / height * 2 - 1
    x = (np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1
    return np.asarray(np.hypot(y[:, None], x[None, :]))


def _mode(pixels: Array) -> Array:
    """The most common colour of (N, 3) pixels, to within what is near it."""
    bins = (pixels / 24).astype(np.int32)
    keys = bins @ np.array([121, 11, 1], np.int32)
    top = pixels[keys == np.bincount(keys).argmax()].mean(0)
    off = np.abs(pixels - top)
    near = pixels[(off[:, 0] < 30) & (off[:, 1] < 30) & (off[:, 2] < 30)]
    return np.asarray(near.mean(0) if len(near) else top, np.float32)


def _background(flat: Array, edge: int = 3) -> Array:
    """The most common colour, where the outer frame counts twice: objects rarely fill both it and the whole."""
    half = flat[::2, ::2]  # every other pixel is enough to vote
    frame = [half[:edge], half[-edge:], half[:, :edge], half[:, -edge:]]
    return _mode(np.concatenate([half.reshape(-1, 3), *(f.reshape(-1, 3) for f in frame)]))


def _noise(image: Array, flat: Array, background: Array) -> float:
    """Standard deviation of the background's pixel noise (Immerkaer 1996: a Laplacian that ignores planes)."""
    response = np.abs(np.diff(np.diff(image.mean(2), 2, axis=0), 2, axis=1))
    clear = np.linalg.norm(flat - background, axis=2) < 70
    inside = ndimage.binary_erosion(clear, _SQUARE, iterations=2)[1:-1, 1:-1]
    if inside.sum() < 50:
        return 0.0
    # the median is 0.674 standard deviations; unlike the mean it ignores what edges are left
    return float(np.median(response[inside]) / 0.6745 / 6)


def _parts(work: Array, background: Array) -> Iterator[_Part]:
    """Connected patches that differ from the background by at least half of the contrast nearby."""
    distance = np.linalg.norm(work - background, axis=2).astype(np.float32)
    nearby = ndimage.maximum_filter(distance, 5)
    there = distance > np.maximum(_MIN_CONTRAST, 0.5 * nearby)
    yield from _connected(there, work, distance, background)


def _connected(
    there: Mask, work: Array, distance: Array, background: Array, left: int = 0, top: int = 0, depth: int = 0
) -> Iterator[_Part]:
    """The patches of a window whose corner is at left, top; cut where they hang together or change colour."""
    labels, _ = ndimage.label(there)
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        mask, colors, contrast = labels[window] == label, work[window], distance[window]
        (y, x), (height, width), area = (window[0].start, window[1].start), mask.shape, int(mask.sum())
        if area < _MIN_AREA:
            continue
        pieces = _pieces(mask, colors, background) if depth < 4 else ()
        for piece in pieces:
            yield from _connected(piece, colors, contrast, background, left + x, top + y, depth + 1)
        if not pieces:
            rgb = np.median(colors[mask & (contrast >= templates.core_level(contrast[mask]))], 0)
            yield _Part(mask=mask, rgb=rgb, left=left + x, top=top + y, width=width, height=height, area=area)


def _pieces(mask: Mask, colors: Array, background: Array) -> tuple[Mask, ...]:
    """The masks into which a patch falls; none if it is one piece of one colour."""
    if (cut := _neck(mask)) is not None:
        return (cut,)
    inside = ndimage.binary_erosion(mask, _SQUARE)
    if (split := _two_colors(colors[inside], background)) is None:
        return ()
    first = np.linalg.norm(colors - split[0], axis=2) < np.linalg.norm(colors - split[1], axis=2)
    return mask & first, mask & ~first


def _neck(mask: Mask) -> Mask | None:
    """The patch cut in two where it hangs together by a neck of a few pixels (squares that touch at a corner)."""
    area = int(mask.sum())
    if max(mask.shape) < 18:  # too small for two objects
        return None
    eroded = mask
    for _ in range(3):
        eroded = ndimage.binary_erosion(eroded, _SQUARE)
        labels, count = ndimage.label(eroded)
        if count < 2:
            continue
        sizes = np.bincount(labels.ravel())
        large = [i for i in range(1, count + 1) if sizes[i] > max(0.6 * _MIN_AREA, 0.12 * area)]
        if len(large) >= 2:
            return _grow_apart(np.where(np.isin(labels, large), labels, 0), mask)
    return None


def _grow_apart(seeds: npt.NDArray[np.int32], mask: Mask) -> Mask:
    """Every pixel goes to its nearest seed; those beside a pixel of another seed go."""
    _, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    owner = np.where(mask, seeds[rows, columns], 9999)
    least = ndimage.minimum_filter(owner, size=3, mode="constant", cval=9999)
    return np.asarray(mask & (least >= owner))


def _two_colors(colors: Array, background: Array) -> tuple[Array, Array] | None:
    """The two colours of a patch where there are clearly two; one mixed with the background does not count."""
    if len(colors) < 24:
        return None
    middle = np.median(colors, 0)
    far = np.linalg.norm(colors - middle, axis=1) > 60
    if far.mean() < 0.12 or far.sum() < 12:
        return None
    other = np.median(colors[far], 0)
    axis = (middle - background) / max(float(np.linalg.norm(middle - background)), 1)
    beside = np.linalg.norm((other - background) - ((other - background) @ axis) * axis)
    return (middle, other) if beside > 45 else None


def _glyphs(parts: list[_Part]) -> list[_Part]:
    """The parts that form a line of writing: neutral ink, alike in height, side by side, and wider than high."""
    ink = [p for p in parts if name_of(p.rgb) in lexicon.NEUTRALS]
    best: list[_Part] = []
    for seed in ink:
        middle = seed.top + seed.height / 2
        line = [
            p
            for p in ink
            if abs(p.top + p.height / 2 - middle) < 0.3 * seed.height and 0.5 < p.height / seed.height < 2
        ]
        width = max(p.left + p.width for p in line) - min(p.left for p in line)
        narrow = min(p.width / p.height for p in line) < 0.5  # an I beside another letter
        if width >= (1.0 if narrow and len(line) > 1 else 1.18) * seed.height and sum(p.area for p in line) > sum(
            p.area for p in best
        ):
            best = line
    return best


def _alphas(work: Array, background: Array, parts: list[_Part]) -> list[tuple[Array, int, int]]:
    """Per part, how much of each pixel it covers, (h, w) in [0, 1], with the crop's left and top.

    A pixel between background and part colour is covered in proportion; it belongs to the nearest part only.
    """
    if not parts:
        return []
    height, width = work.shape[:2]
    owner = np.zeros((height, width), np.int32)
    for i, part in enumerate(parts, start=1):
        owner[part.top : part.top + part.height, part.left : part.left + part.width][part.mask] = i
    reach, (rows, columns) = ndimage.distance_transform_edt(owner == 0, return_indices=True)
    owner = np.where(reach <= 4, owner[rows, columns], 0)
    crops = []
    for i, part in enumerate(parts, start=1):
        x0, y0 = max(part.left - 4, 0), max(part.top - 4, 0)
        x1, y1 = min(part.left + part.width + 4, width), min(part.top + part.height + 4, height)
        axis = part.rgb - background
        alpha = (work[y0:y1, x0:x1] - background) @ axis / float(axis @ axis)
        # a pixel off the line between the two colours is not a mixture of them
        alpha = np.where(owner[y0:y1, x0:x1] == i, np.clip(alpha, 0, 1), 0)
        crops.append((alpha.astype(np.float32), x0, y0))
    return crops


def _blur(alphas: list[tuple[Array, int, int]]) -> float | None:
    """Standard deviation in pixels of the blur of the parts' edges; None where there is no edge.

    A step blurred by s has the central difference phi = (2 Phi(1 / s) - 1) / 2 at its middle.
    """
    slopes = [_edge_slope(alpha) for alpha, _, _ in alphas]
    if not slopes:
        return None
    slope = float(np.clip(np.median(slopes), 0.05, 0.495))
    return float(1 / _normal_quantile(0.5 + slope))


def _normal_quantile(p: float) -> float:
    """Quantile of the standard normal distribution."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def _edge_slope(alpha: Array) -> float:
    dy, dx = np.gradient(alpha)
    slope = np.hypot(dx, dy)
    inside = alpha > 0.5
    edge = ndimage.binary_dilation(inside, _SQUARE) & ~ndimage.binary_erosion(inside, _SQUARE)
    return float(np.percentile(slope[edge], 75)) if edge.any() else 0.5


def _thing(part: _Part, crop: tuple[Array, int, int], blur: float, width: int, height: int) -> Thing:
    alpha, x0, y0 = crop
    fits = templates.fit(alpha, blur)
    best = max(fits.values(), key=lambda f: f.overlap)
    side = max(width, height)
    box = (part.left / width, part.top / height, (part.left + part.width) / width, (part.top + part.height) / height)
    return Thing(
        rgb=_rgb(part.rgb),
        color=name_of(part.rgb),
        box=box,
        x=(x0 + best.x) / side,
        y=(y0 + best.y) / side,
        radius=best.radius / side,
        shapes=templates.scores(fits),
    )


def _rgb(color: Array) -> tuple[float, float, float]:
    r, g, b = (float(c) for c in color)
    return r, g, b


def _union(parts: list[_Part], width: int, height: int) -> Box | None:
    if not parts:
        return None
    return (
        min(p.left for p in parts) / width,
        min(p.top for p in parts) / height,
        max(p.left + p.width for p in parts) / width,
        max(p.top + p.height for p in parts) / height,
    )
