"""Scenes, captions and pixels in bulk, for training the embedded model."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from rlhf_img.playground.captions import caption
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import (
    BACKGROUNDS,
    COLORS,
    RADII,
    RELATIONS,
    SHAPES,
    STYLED,
    STYLES,
    WORDS,
    Scene,
    Split,
    break_scene,
    sample_scene,
    splits_of,
)

WRONG_CAPTIONS = 0.05
"""Share of captions in the DiT's training data that describe a scene with one fact changed. Captions of real
training sets are wrong too; it is part of what leaves alignment something to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """An image with its truth and its caption (which may be wrong, see WRONG_CAPTIONS)."""

    scene: Scene
    caption: str
    image: np.ndarray
    """uint8 (64, 64, 3), RGB."""


def example(
    seed: int, split: Split = "train", *, wrong_captions: float = 0.0, styled: float = STYLED
) -> Example:
    """The example of a seed: the same on every machine. `styled` is the share of scenes in a deliberate style."""
    scene, told = _described(seed, split, wrong_captions, styled)
    return Example(scene=scene, caption=told, image=render(scene, seed))


def _described(
    seed: int, split: Split, wrong_captions: float = 0.0, styled: float = STYLED
) -> tuple[Scene, str]:
    """The scene and the caption of an example."""
    rng = np.random.default_rng((seed, len(split)))
    scene = sample_scene(rng, split, styled)
    told = break_scene(scene, rng)[0] if rng.random() < wrong_captions else scene
    if splits_of(told) != splits_of(scene):
        told = scene  # else unseen combinations would be shown in training after all, and wrongly
    return scene, caption(told, rng)


def prompts(split: Split, count: int, seed: int = 0) -> list[str]:
    """`count` different captions of scenes of a split."""
    found: dict[str, None] = {}
    for i in range(100 * count):
        if len(found) == count:
            break
        found.setdefault(_described(1_000_003 * (seed + 1) + i, split)[1])
    return list(found)


_FACTS: tuple[tuple[str, ...], ...] = (
    *2 * ((*COLORS, ""), (*SHAPES, ""), (*RADII, ""), ("1", "2", "3", "4", "")),
    (*RELATIONS, ""), tuple(BACKGROUNDS), (*WORDS, ""), (*STYLES, ""),
)
FACT_SIZES = tuple(len(options) for options in _FACTS)
"""Classes of each fact that `facts` gives."""


def facts(scene: Scene) -> list[int]:
    """The truth of a scene as one class a fact: colour, shape, size and number of each of two kinds of thing in the
    order in which a caption names them, then relation, background, word and style. What is not there is a class."""
    kinds = Counter((t.color, t.shape, t.size) for t in scene.things)
    told = [value for kind, count in kinds.items() for value in (*kind, str(count))]
    told += [""] * (8 - len(told)) + [scene.relation or "", scene.background, scene.word or "", scene.style or ""]
    return [options.index(value) for options, value in zip(_FACTS, told, strict=True)]
