"""Structural defects, drawn into clean pictures: the artifact reward learns from these, and their exact masks.

A defect is something no prompt of the playground asks for. Appearance (grain, blur, vignette, exposure) is not one.
Injectors take an image uint8 (H, W, 3) and object masks bool (N, H, W), or those of glyphs, and return the damaged
image. They work on the picture before any style is applied, as a broken thing photographed on grainy film is broken and
grainy.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image as PIL
from PIL import ImageDraw
from scipy import ndimage
from skimage.draw import line, polygon

from rlhf_img.playground.render import SCALE, draw_word, outline, word_y
from rlhf_img.playground.scene import COLORS, SIZE, Scene
from rlhf_img.rewards.masks import center_of, color_of, disc, nearest_points, pick, point_in, radius_of, ragged_blob

Image = np.ndarray
Injector = Callable[[Image, np.ndarray, np.random.Generator], Image]

GARBLED = "garbled glyph"
"""The class whose injectors take masks of glyphs and not of objects."""
_PALETTE = np.array(list(COLORS.values()), dtype=np.uint8)


def object_masks(scene: Scene) -> np.ndarray:
    """Where each thing of a scene is: bool (N, 64, 64). The word, if any, is not among them."""
    masks = np.zeros((len(scene.things), SIZE, SIZE), dtype=bool)
    for mask, thing in zip(masks, scene.things, strict=True):
        corners = np.array(outline(thing.shape, thing.x, thing.y, thing.radius))
        rows, columns = polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, (SIZE, SIZE))
        mask[rows, columns] = True
    return masks


def glyph_masks(scene: Scene) -> np.ndarray:
    """Where each letter of a scene's word is: bool (N, 64, 64), N = 0 without a word."""
    canvas = PIL.new("L", (SIZE * SCALE, SIZE * SCALE))
    if scene.word:
        draw_word(ImageDraw.Draw(canvas), scene.word, word_y(scene), 255)
    return letters_of(np.asarray(canvas.resize((SIZE, SIZE), PIL.Resampling.BOX)) / 255)


def letters_of(ink_HW: np.ndarray) -> np.ndarray:
    """The letters that are written with this coverage, in [0, 1]: bool (N, H, W)."""
    labels, count = ndimage.label(ink_HW > 0.4, np.ones((3, 3)))
    return np.stack([labels == i for i in range(1, count + 1)]) if count else np.zeros((0, *ink_HW.shape), dtype=bool)


def parts_of(scene: Scene, name: str) -> np.ndarray:
    """Masks of what a defect of this class breaks: letters, or things."""
    return glyph_masks(scene) if name == GARBLED else object_masks(scene)


def torn_edge(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A ragged bite out of an object's outline, with a few torn-off crumbs beside it."""
    thing = pick(objects, rng)
    y, x = point_in(thing & ~ndimage.binary_erosion(thing), rng)
    radius = radius_of(thing)
    bite = ragged_blob(image.shape, y, x, rng.uniform(0.35, 0.6) * radius + 1.5, 0.35, rng) & thing
    crumbs = ragged_blob(image.shape, y, x, 0.9 * radius, 0.3, rng) & ~thing & (rng.random(thing.shape) < 0.18)
    out = image.copy()
    out[crumbs] = color_of(image, thing)
    out[bite] = _background(image, objects)
    return out


def fused_shapes(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """Two objects grown together by a bridge; or a second one of another colour, grown out of one."""
    out = image.copy()
    if len(objects) > 1 and rng.random() < 0.6:
        first, second = (objects[i] for i in rng.choice(len(objects), 2, replace=False))
        (ya, xa), (yb, xb) = nearest_points(first, second)
        bridge = np.zeros(first.shape, dtype=bool)
        bridge[line(ya, xa, yb, xb)] = True
        bridge = ndimage.binary_dilation(bridge, disc(rng.uniform(1.6, 3.2)))
        out[bridge & ~first & ~second] = color_of(image, (first, second)[rng.integers(2)])
        return out
    thing = pick(objects, rng)
    out[_shifted(thing, rng.uniform(0.6, 1.1), rng) & ~thing] = _other_color(color_of(image, thing), rng)
    return out


def duplicate(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """An object's own copy grown out of it, or its outline drawn a second time beside it."""
    thing = pick(objects, rng)
    out = image.copy()
    copy = _shifted(thing, rng.uniform(0.7, 1.2), rng)
    if rng.random() < 0.4:
        copy &= ~ndimage.binary_erosion(copy, disc(rng.uniform(1.2, 2.2)))
    out[copy & ~thing] = color_of(image, thing)
    return out


def hole(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """One or two gaps inside an object, through which the background (or nothing but darkness) shows."""
    thing = pick(objects, rng)
    inside = ndimage.binary_erosion(thing, iterations=2)
    out = image.copy()
    for _ in range(int(rng.integers(1, 3))):
        y, x = point_in(inside if inside.any() else thing, rng)
        gap = ragged_blob(image.shape, y, x, rng.uniform(0.25, 0.4) * radius_of(thing) + 1.0, 0.2, rng)
        out[gap & ndimage.binary_erosion(thing)] = _background(image, objects) if rng.random() < 0.75 else 10
    return out


def speckle(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A local patch of coloured or black-and-white dots: unlike grain it is strong, in colour and in one place."""
    anywhere = np.ones(image.shape[:2], dtype=bool)
    y, x = point_in(pick(objects, rng) if rng.random() < 0.6 else anywhere, rng)
    patch = ragged_blob(image.shape, y, x, rng.uniform(5, 10), 0.3, rng)
    dots = patch & (rng.random(patch.shape) < rng.uniform(0.2, 0.5))
    if rng.random() < 0.4:
        dots = patch & ndimage.binary_dilation(dots & (rng.random(patch.shape) < 0.3), np.ones((2, 2)))
    colors = rng.integers(0, 256, image.shape) if rng.random() < 0.6 else rng.integers(0, 2, (*patch.shape, 1)) * 255
    return np.where(dots[..., None], colors, image).astype(np.uint8)


def seam(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """A strip through an object out of place, a foreign line, or a grid of lines."""
    turned = rng.random() < 0.5
    view = image.transpose(1, 0, 2) if turned else image
    out = view.copy()
    thing = pick(objects, rng)
    y, _ = point_in(thing.T if turned else thing, rng)
    contrast = rng.uniform(45, 100) * rng.choice((-1, 1))
    match rng.integers(3):
        case 0:
            # A strip and not all that lies below: of that, most would look whole, and be labelled broken.
            span = slice(y, y + int(rng.integers(3, 10)))
            out[span] = np.roll(view[span], int(rng.integers(3, 7)) * int(rng.choice((-1, 1))), axis=1)
        case 1:
            out[y : y + int(rng.integers(1, 3))] = np.clip(view[y : y + 1] + contrast, 0, 255)
        case _:
            period = int(rng.choice((4, 8, 8, 16)))
            lines = np.zeros(view.shape, dtype=bool)
            lines[rng.integers(period) :: period] = True
            lines[:, rng.integers(period) :: period] = True
            out = np.where(lines, np.clip(view + contrast * 0.7, 0, 255), view).astype(np.uint8)
    return np.ascontiguousarray(out.transpose(1, 0, 2) if turned else out)


def color_bleed(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """An object's colour smeared over its surroundings, or a foreign colour running into the object."""
    thing = pick(objects, rng)
    radius = radius_of(thing)
    y, x = point_in(thing & ~ndimage.binary_erosion(thing), rng)
    if rng.random() < 0.5:
        source, target, color = thing, ~objects.any(axis=0), color_of(image, thing)
        center_y, center_x = center_of(thing)
        y, x = y + (y - center_y) // 2, x + (x - center_x) // 2  # further out
    else:
        source, target, color = thing, thing, _other_color(color_of(image, thing), rng)
    spot = ndimage.gaussian_filter(ragged_blob(image.shape, y, x, 0.9 * radius + 1, 0.2, rng).astype(float), 1.2)
    near = ndimage.gaussian_filter(source.astype(float), rng.uniform(2.5, 4)) * 3
    alpha = np.clip(spot * np.clip(near, 0, 1) * rng.uniform(1.2, 1.8), 0, 0.95) * target
    return np.round(image + alpha[..., None] * (np.asarray(color) - image.astype(float))).astype(np.uint8)


def malformed_outline(image: Image, objects: np.ndarray, rng: np.random.Generator) -> Image:
    """An object bent out of shape: its surroundings displaced by a smooth random field."""
    thing = pick(objects, rng)
    radius = radius_of(thing)
    field = ndimage.gaussian_filter(rng.standard_normal((2, *thing.shape)), (0, 0.3 * radius, 0.3 * radius))
    field *= (0.5 + rng.uniform(0.12, 0.26) * radius) / field[:, thing].std()
    near = ndimage.gaussian_filter(ndimage.binary_dilation(thing, iterations=3).astype(float), 1.5)
    rows, columns = np.indices(thing.shape) + field * near
    channels = [ndimage.map_coordinates(image[..., c].astype(float), (rows, columns), order=1, mode="nearest")
                for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def garbled_glyph(image: Image, glyphs: np.ndarray, rng: np.random.Generator) -> Image:
    """Some letters of a word made signs that are none: parts out of place or gone, and strokes that no letter has."""
    word: np.ndarray = np.any(glyphs, axis=0)
    inside = ndimage.binary_erosion(word)
    ink = color_of(image, inside if inside.any() else word)
    chosen = glyphs[rng.permutation(len(glyphs))[: rng.integers(1, len(glyphs) + 1)]]
    signs = np.any([_garbled(glyph, rng) for glyph in chosen], axis=0)
    gone = ndimage.binary_dilation(chosen.any(axis=0), iterations=2)
    around = ndimage.distance_transform_edt(gone | ndimage.binary_dilation(word, iterations=2), return_distances=False,
                                            return_indices=True)
    out = np.where(gone[..., None], image[tuple(around)], image)
    alpha = ndimage.gaussian_filter((signs | (word & gone & ~chosen.any(axis=0))).astype(float), 0.4)[..., None]
    return np.round(out + alpha * (ink - out.astype(float))).astype(np.uint8)


INJECTORS: dict[str, Injector] = {
    "torn edge": torn_edge,
    "fused shapes": fused_shapes,
    "duplicate": duplicate,
    "hole": hole,
    "speckle": speckle,
    "seam": seam,
    "colour bleed": color_bleed,
    "malformed outline": malformed_outline,
    GARBLED: garbled_glyph,
}
CLASSES = tuple(INJECTORS)
"""The structural defect classes, in the order of the model's outputs."""

APPEARANCES = ("blur", "grain", "noise", "bokeh", "exposure", "compression")
"""Classes of looks. They are no defects unless a reward is told to take them for some; outputs after the defects'."""

_PERMIT_WORDS: dict[str, tuple[str, ...]] = {
    "torn edge": ("torn", "ragged", "torn edges"),
    "fused shapes": ("fused", "merged", "overlap"),
    "duplicate": ("double exposure", "doubled", "ghosting", "mirrored"),
    "hole": ("holes", "hollow"),
    "speckle": ("speckles", "confetti", "glitch"),
    "seam": ("seams", "grid", "collage", "glitch"),
    "colour bleed": ("color bleed", "bleed", "watercolour", "watercolor", "gradient"),
    "malformed outline": ("malformed", "distorted", "warped", "hand drawn", "sketch"),
    "garbled glyph": ("illegible", "scribble", "scribbles", "gibberish", "invented script"),
    "blur": ("blurry", "soft focus", "soft", "motion blur"),
    "grain": ("film grain",),
    "noise": ("grain", "film grain"),
    "bokeh": ("blur", "depth of field", "shallow depth of field"),
    "exposure": ("overexposed", "underexposed", "dark", "high key", "low key", "vignette"),
    "compression": ("jpeg", "lo fi"),
}


def permitted(permits: Sequence[str], classes: Sequence[str] = CLASSES) -> frozenset[str]:
    """Those of `classes` that a prompt asks for, from the `permits` of its requirements.

    A permit that names none of them changes nothing: by default grain, blur and other looks are no defects anyway.

    >>> sorted(permitted(["grain", "colour_bleed", "hollow"]))
    ['colour bleed', 'hole']
    """
    asked = {permit.lower().replace("_", " ").replace("-", " ").strip() for permit in permits}
    return frozenset(name for name in classes if asked & {name, *_PERMIT_WORDS[name]})


def inject(
    name: str,
    image: Image,
    objects: np.ndarray,
    rng: np.random.Generator,
    *,
    tries: int = 6,
    injectors: Mapping[str, Injector] = INJECTORS,
) -> Image | None:
    """The image with one defect of a class that changes at least 16 px clearly, or None if it found no room for one.

    objects: as the class's injector takes them, see `parts_of`.
    """
    for _ in range(tries if len(objects) else 0):
        damaged = injectors[name](image, objects, rng)
        if (np.abs(damaged.astype(int) - image).max(axis=-1) > 40).sum() >= 16:
            return damaged
    return None


def _shifted(thing: np.ndarray, radii: float, rng: np.random.Generator) -> np.ndarray:
    """The object's mask moved by so many of its radii in a random direction."""
    angle, reach = rng.uniform(0, 2 * np.pi), radii * radius_of(thing)
    moved: np.ndarray = ndimage.shift(thing, (reach * np.sin(angle), reach * np.cos(angle)), order=0)
    return moved


def _other_color(color: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    others = [c for c in _PALETTE if np.abs(c.astype(int) - color).max() > 60]
    return np.asarray(others[rng.integers(len(others))])


def _garbled(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A letter's mask with its lower or right part moved or turned over, a piece gone, and foreign strokes."""
    rows, columns = ndimage.find_objects(glyph.astype(int))[0]
    turned = rng.random() < 0.5
    sign = glyph[rows, columns].T.copy() if turned else glyph[rows, columns].copy()
    height, width = sign.shape
    cut = int(rng.integers(height // 3, max(height // 3 + 1, 2 * height // 3 + 1)))
    if rng.random() < 0.5:
        sign[cut:] = sign[cut:, ::-1]
    by = max(1, round(rng.uniform(0.2, 0.5) * width)) * int(rng.choice((-1, 1)))
    sign[cut:] = np.roll(sign[cut:], by, axis=1)
    if rng.random() < 0.5:
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        sign &= ~ragged_blob(sign.shape, y, x, 0.3 * min(height, width), 0.3, rng)
    for _ in range(int(rng.integers(1, 3))):
        (ya, yb), (xa, xb) = rng.integers(height, size=2), rng.integers(width, size=2)
        stroke = np.zeros_like(sign)
        stroke[line(ya, xa, yb, xb)] = True
        sign |= ndimage.binary_dilation(stroke, disc(max(0.5, 0.07 * max(height, width))))
    out = np.zeros_like(glyph)
    out[rows, columns] = sign.T if turned else sign
    return out


def _background(image: Image, objects: np.ndarray) -> np.ndarray:
    return color_of(image, ~np.any(objects, axis=0))
