"""The structural defects of `defects.py` for photographs: there nobody says where the things are, and nothing is flat.

Regions of the picture itself stand for its things, and what is filled in has the picture's texture: a flat patch in a
photograph would be found by its flatness. Sizes grow with the picture's side; places and strengths are random.
"""

import colorsys

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw, ImageFont
from scipy import ndimage
from skimage.draw import line
from skimage.segmentation import felzenszwalb

from rlhf_img.rewards.defects import (
    CLASSES,
    GARBLED,
    Image,
    Injector,
    garbled_glyph,
    letters_of,
    malformed_outline,
)
from rlhf_img.rewards.masks import center_of, color_of, disc, nearest_points, pick, point_in, radius_of, ragged_blob

_FINE = 4
"""Words are drawn this many times larger and averaged down, which antialiases them."""


def regions(image: Image, rng: np.random.Generator) -> np.ndarray:
    """Parts of a picture uint8 (H, W, 3) that may stand for things: bool (N, H, W), N >= 2.

    They are segments (Felzenszwalb and Huttenlocher) of 1.5 to 30 % of the area, and two ragged blobs at random
    places, because a defect may also break what is no segment.
    """
    height, width = image.shape[:2]
    area, side = height * width, min(height, width)
    labels = felzenszwalb(image, scale=rng.uniform(50, 300), sigma=0.8, min_size=max(20, area // 100))
    shares = np.bincount(labels.ravel()) / area
    chosen = [ndimage.binary_fill_holes(labels == label) for label in np.flatnonzero((shares > 0.015) & (shares < 0.3))]
    for _ in range(2):
        y, x = rng.uniform(0.2, 0.8, 2) * (height, width)
        chosen.append(ragged_blob(image.shape, y, x, rng.uniform(0.1, 0.22) * side, 0.25, rng))
    return np.stack(chosen)


def prepared(name: str, image: Image, rng: np.random.Generator) -> tuple[Image, np.ndarray]:
    """The clean picture that a defect of this class can break, and masks (N, H, W) of its parts: regions, or letters.

    A letter needs a word, which a picture seldom has: one is written into it. Its clean twin has it too, so that
    writing itself is no defect.
    """
    return lettered(image, rng) if name == GARBLED else (image, regions(image, rng))


def lettered(image: Image, rng: np.random.Generator) -> tuple[Image, np.ndarray]:
    """The picture with a word of 2 to 5 signs of random size, place and colour, and masks of its letters."""
    height, width = image.shape[:2]
    word = "".join(rng.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ23456789"), int(rng.integers(2, 6))))
    font = ImageFont.load_default(size=rng.uniform(0.9, 1.5) * _FINE * width / len(word))
    canvas = PIL.new("L", (width * _FINE, height * _FINE))
    x, y = rng.uniform((0.42, 0.15), (0.58, 0.85)) * (width * _FINE, height * _FINE)
    ImageDraw.Draw(canvas).text((x, y), word, fill=255, font=font, anchor="mm", stroke_width=int(rng.integers(0, 4)))
    ink_HW = np.asarray(canvas.resize((width, height), PIL.Resampling.BOX)) / 255
    dark = image[ink_HW > 0].mean() > 128 if (ink_HW > 0).any() else True
    value = rng.uniform(0, 0.25) if dark else rng.uniform(0.8, 1)
    color = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.6), value)) * 255
    return _blend(image, color, ink_HW), letters_of(ink_HW)


def torn_edge(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A ragged bite out of a region's outline, filled with what lies further out, and torn-off crumbs beside it."""
    thing = pick(objects, rng)
    y, x = point_in(thing & ~ndimage.binary_erosion(thing), rng)
    radius = _reach(thing)
    bite = ragged_blob(image.shape, y, x, rng.uniform(0.45, 0.9) * radius + 1.5, 0.35, rng) & thing
    crumbs = ragged_blob(image.shape, y, x, 0.9 * radius, 0.3, rng) & ~thing
    crumbs &= ndimage.zoom(rng.random((image.shape[0] // 2 + 1, image.shape[1] // 2 + 1)), 2, order=0)[
        : image.shape[0], : image.shape[1]] < 0.2
    center_y, center_x = center_of(thing)
    out = image.copy()
    out[bite] = _moved(image, center_y - y, center_x - x)[bite]
    out[crumbs] = _moved(image, y - center_y, x - center_x)[crumbs]
    return out


def fused_shapes(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """Two regions grown together by a bridge of the one's texture; or one grown on with the texture of another."""
    out = image.copy()
    first, second = (objects[i] for i in rng.choice(len(objects), 2, replace=False))
    if rng.random() < 0.5 and not (ndimage.binary_dilation(first, iterations=3) & second).any():
        (ya, xa), (yb, xb) = nearest_points(first, second)
        grown = np.zeros(first.shape, dtype=bool)
        grown[line(ya, xa, yb, xb)] = True
        grown = ndimage.binary_dilation(grown, disc(rng.uniform(0.025, 0.06) * _side(image))) & ~first & ~second
        texture = first
    else:
        grown = ndimage.shift(first, _some_way(first, rng), order=0) & ~first
        texture = second
    if grown.any():
        (y, x), (source_y, source_x) = center_of(grown), center_of(texture)
        out[grown] = _moved(image, y - source_y, x - source_x)[grown]
    return out


def duplicate(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A second copy of a region grown out of it: the same texture twice, side by side."""
    thing = pick(objects, rng)
    dy, dx = _some_way(thing, rng)
    copy = ndimage.shift(thing, (dy, dx), order=0) & ~thing
    out = image.copy()
    out[copy] = _moved(image, dy, dx)[copy]
    return out


def hole(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """One or two gaps inside a region, through which another part of the picture, or one colour, shows."""
    thing = pick(objects, rng)
    inside = ndimage.binary_erosion(thing, iterations=2)
    out = image.copy()
    for _ in range(int(rng.integers(1, 3))):
        y, x = point_in(inside if inside.any() else thing, rng)
        gap = ragged_blob(image.shape, y, x, rng.uniform(0.25, 0.5) * _reach(thing) + 1.0, 0.2, rng)
        match rng.integers(4):
            case 0:
                out[gap] = 10 if rng.random() < 0.7 else 245
            case 1:
                out[gap] = color_of(image, ~thing)
            case _:
                out[gap] = _foreign(image, gap, rng)[gap]
    return out


def speckle(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A local patch of coloured or black-and-white dots: unlike grain it is strong, in colour and in one place."""
    anywhere = np.ones(image.shape[:2], dtype=bool)
    y, x = point_in(pick(objects, rng) if rng.random() < 0.6 else anywhere, rng)
    patch = ragged_blob(image.shape, y, x, rng.uniform(0.08, 0.2) * _side(image), 0.3, rng)
    dots = patch & (rng.random(patch.shape) < rng.uniform(0.2, 0.6))
    if rng.random() < 0.4:
        dots = patch & ndimage.binary_dilation(dots & (rng.random(patch.shape) < 0.3), np.ones((2, 2)))
    colors = rng.integers(0, 256, image.shape) if rng.random() < 0.6 else rng.integers(0, 2, (*patch.shape, 1)) * 255
    return _blend(image, colors, dots * rng.uniform(0.6, 1))


def seam(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A strip of the picture out of place, over part of its width or all of it; a foreign line; or a grid of lines."""
    turned = rng.random() < 0.5
    view = image.transpose(1, 0, 2) if turned else image
    out = view.copy()
    thing = pick(objects, rng)
    unit = _side(image) / 64
    y, x = point_in(thing.T if turned else thing, rng)
    length = int(view.shape[1] * rng.uniform(0.4, 1.2))
    span = slice(max(0, x - length // 2), x + length // 2 + 1)
    contrast = rng.uniform(45, 100) * rng.choice((-1, 1))
    match rng.integers(5):
        case 0:
            period = max(2, int(rng.choice((4, 8, 8, 16)) * unit))
            lines = np.zeros(view.shape, dtype=bool)
            lines[rng.integers(period) :: period] = True
            lines[:, rng.integers(period) :: period] = True
            out = np.where(lines, np.clip(view + contrast * 0.7, 0, 255), view).astype(np.uint8)
        case 1 | 2:
            rows = slice(y, y + max(1, int(rng.uniform(1, 2.5) * unit)))
            out[rows, span] = np.clip(view[rows, span] + contrast, 0, 255)
        case _:
            rows = slice(y, y + max(3, int(rng.uniform(3, 12) * unit)))
            shift = max(3, int(rng.uniform(4, 12) * unit)) * int(rng.choice((-1, 1)))
            out[rows, span] = _moved(view, 0, shift)[rows, span]
    return np.ascontiguousarray(out.transpose(1, 0, 2) if turned else out)


def color_bleed(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A region's colour smeared over its surroundings, or a foreign colour running into the region."""
    thing = pick(objects, rng)
    radius = _reach(thing)
    y, x = point_in(thing & ~ndimage.binary_erosion(thing), rng)
    own = color_of(image, thing)
    if rng.random() < 0.4:
        target, color = ~thing, own
    else:
        hue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.4, 1))
        target, color = thing | (rng.random() < 0.5), np.array(hue) * 255
    spot = ragged_blob(image.shape, y, x, rng.uniform(0.7, 1.1) * radius + 1, 0.2, rng)
    soft = ndimage.gaussian_filter(spot.astype(float), 0.02 * _side(image))
    return _blend(image, color, soft * target * rng.uniform(0.5, 0.95))


INJECTORS: dict[str, Injector] = dict(zip(
    CLASSES, (torn_edge, fused_shapes, duplicate, hole, speckle, seam, color_bleed, malformed_outline, garbled_glyph),
    strict=True))
"""By the same names as on the playground, so that the same network and the same reward read the weights."""


def _side(image: Image) -> int:
    return min(image.shape[:2])


def _reach(thing: np.ndarray) -> float:
    """The region's radius; of long or large ones no more than a fifth of the picture's side, to stay local."""
    return min(radius_of(thing), 0.2 * min(thing.shape))


def _some_way(thing: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns by which a region's copy overlaps it in part."""
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.2) * _reach(thing)
    return round(reach * np.sin(angle)), round(reach * np.cos(angle))


def _moved(image: Image, dy: int, dx: int) -> Image:
    """The picture shifted down by dy and right by dx; what comes in from outside is its mirror image."""
    rows, columns = (_mirror(np.arange(length) - by, length) for by, length in zip((dy, dx), image.shape, strict=False))
    return image[rows[:, None], columns]


def _mirror(index: np.ndarray, length: int) -> np.ndarray:
    folded = index % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)


def _foreign(image: Image, mask: np.ndarray, rng: np.random.Generator) -> Image:
    """The picture shifted so that, of four shifts, the one that changes most under the mask was taken."""
    shifts = rng.integers(-_side(image) // 2, _side(image) // 2, (4, 2))
    moved = [_moved(image, int(dy), int(dx)) for dy, dx in shifts]
    return max(moved, key=lambda other: float(np.abs(other[mask].astype(int) - image[mask]).mean()))


def _blend(image: Image, color: np.ndarray, alpha: np.ndarray) -> Image:
    """Colours laid over the picture, alpha (H, W) in [0, 1]."""
    return np.round(image + alpha[..., None] * (np.asarray(color) - image.astype(float))).astype(np.uint8)
