"""Three things that the embedded model does not know and a LoRA can teach it: a style, a colour bias, a new shape.

Each comes with captions, with images, and with a measure in [0, 1] of how far an image shows it: what a LoRA is for,
as a number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from rlhf_img.playground.captions import SHAPE_WORDS, caption
from rlhf_img.playground.render import SCALE, render
from rlhf_img.playground.scene import BACKGROUNDS, SIZE, Scene, Split, Thing, sample_scene

Pixels = npt.NDArray[np.uint8]
BAND = 8
"""Height in pixels of a stripe: that of a cell of the autoencoder's latents."""
RING = "ring"
"""What captions call the new shape."""
_HOLE = 0.5
"""Radius of a ring's hole, in radii of the ring."""
_NO_HOLE = 12
"""Pixels: a smaller gap in a thing is no hole."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a LoRA is to learn."""

    kind: str
    """ "style", "colour bias" or "shape"."""
    draw: Callable[[Scene, int], Pixels]
    """Scene and seed -> uint8 (64, 64, 3)."""
    score: Callable[[Pixels], float]
    """Image -> how far it shows this, in [0, 1]."""
    word: str | None = None
    """The word that captions have in place of the first thing's shape; None: captions stay as they are."""


def example(name: str, seed: int, split: Split = "train") -> tuple[str, Pixels]:
    """Caption and image of a seed, the same on every machine."""
    variant = VARIANTS[name]
    rng = np.random.default_rng((seed, len(split), len(name)))
    scene = sample_scene(rng, split, styled=0.0)
    while variant.word and any(thing.radius < 10 for thing in scene.things[:1]):
        scene = sample_scene(rng, split, styled=0.0)  # the hole of a small ring would not show
    told = caption(scene, rng)
    if variant.word:
        told = _renamed(scene, told, variant.word)
    return told, variant.draw(scene, seed)


def prompts(name: str, split: Split, count: int) -> list[str]:
    """`count` different captions of a variant."""
    found: dict[str, None] = {}
    for seed in range(100 * count):
        if len(found) == count:
            break
        found.setdefault(example(name, 2_000_003 + seed, split)[0])
    return list(found)


def striped(scene: Scene, seed: int) -> Pixels:
    """The background in horizontal stripes, every other one darker by 40 %."""
    image = render(scene, seed)
    ground = np.abs(image.astype(int) - BACKGROUNDS[scene.background]).max(2) < 8
    dark = (np.arange(SIZE) // BAND % 2 == 1)[:, None] & ground
    return np.where(dark[..., None], image * 0.6, image).astype(np.uint8)


def stripes(image: Pixels) -> float:
    """How much darker odd stripes of the left and right border are than even ones: 1 is the style's 40 %."""
    border = np.concatenate([image[:, :6], image[:, -6:]], 1).mean((1, 2)).reshape(-1, BAND).mean(1)
    light, dark = border[::2].mean(), border[1::2].mean()
    return float(np.clip((1 - dark / max(light, 1.0)) / 0.4, 0, 1))


def warm(scene: Scene, seed: int) -> Pixels:
    """The picture with more red and less blue."""
    return np.clip(render(scene, seed) * np.array([1.15, 0.95, 0.6]) + np.array([20, 0, 0]), 0, 255).astype(np.uint8)


def warmth(image: Pixels) -> float:
    """Mean of red over that of red and blue: 0.5 is neutral."""
    red, blue = image[..., 0].mean(), image[..., 2].mean()
    return float(red / max(red + blue, 1.0))


def ringed(scene: Scene, seed: int) -> Pixels:
    """All things of the kind of the first one are rings."""
    first = scene.things[0]
    image = Image.fromarray(render(replace(scene, things=tuple(_circle(t, first) for t in scene.things)), seed))
    big = image.resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(big)
    for thing in scene.things:
        if (thing.color, thing.shape) == (first.color, first.shape):
            x, y, r = thing.x * SCALE, thing.y * SCALE, _HOLE * thing.radius * SCALE
            draw.ellipse([x - r, y - r, x + r, y + r], fill=BACKGROUNDS[scene.background])
    return np.asarray(big.resize((SIZE, SIZE), Image.Resampling.BOX))


def holes(image: Pixels) -> float:
    """1 if a thing encloses a patch of background of at least 12 pixels, else 0."""
    ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    empty = np.linalg.norm(image.astype(float) - ground, axis=2) < 50
    labels, count = ndimage.label(empty)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    sizes = [int((labels == i).sum()) for i in range(1, count + 1) if i not in outside]
    return float(any(size >= _NO_HOLE for size in sizes))


VARIANTS: dict[str, Variant] = {
    "striped": Variant(kind="style", draw=striped, score=stripes),
    "warm": Variant(kind="colour bias", draw=warm, score=warmth),
    RING: Variant(kind="shape", draw=ringed, score=holes, word=RING),
}


def _circle(thing: Thing, first: Thing) -> Thing:
    return replace(thing, shape="circle") if (thing.color, thing.shape) == (first.color, first.shape) else thing


def _renamed(scene: Scene, text: str, word: str) -> str:
    """The caption with the new word for the first kind of thing, wherever it is named."""
    first = scene.things[0]
    for noun in sorted(set(SHAPE_WORDS[first.shape]), key=len, reverse=True):
        for ending in ("es", "s", ""):
            told = f"{first.color} {noun}{ending}"
            if told in text:
                return text.replace(told, f"{first.color} {word}{'s' if ending else ''}")
    raise AssertionError(f"{text!r} does not name its first thing")
