"""Scenes, captions and pixels in bulk, for training the embedded model."""

from dataclasses import dataclass

import numpy as np

from rlhf_img.playground.captions import caption
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import Scene, Split, break_scene, sample_scene

WRONG_CAPTIONS = 0.25
"""Share of captions in the DiT's training data that describe a scene with one fact changed. Captions of real
training sets are wrong about as often as that; it is what leaves alignment something to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """An image with its truth and its caption (which may be wrong, see WRONG_CAPTIONS)."""

    scene: Scene
    caption: str
    image: np.ndarray
    """uint8 (64, 64, 3), RGB."""


def example(seed: int, split: Split = "train", wrong_captions: float = 0.0) -> Example:
    """The example of a seed: the same on every machine."""
    rng = np.random.default_rng((seed, len(split)))
    scene = sample_scene(rng, split)
    image = render(scene, seed)
    told = break_scene(scene, rng)[0] if rng.random() < wrong_captions else scene
    return Example(scene=scene, caption=caption(told, rng), image=image)


def prompts(split: Split, count: int, seed: int = 0) -> list[str]:
    """`count` different captions of scenes of a split."""
    found: dict[str, None] = {}
    for i in range(100 * count):
        if len(found) == count:
            break
        found.setdefault(example(1_000_003 * (seed + 1) + i, split).caption)
    return list(found)


def describe(scene: Scene) -> str:
    """The canonical description that the text encoder learns to give after a caption."""
    groups: dict[tuple[str, str, str], int] = {}
    for t in scene.things:
        groups[t.size, t.color, t.shape] = groups.get((t.size, t.color, t.shape), 0) + 1
    parts = [f"{n} {color} {shape} {size}" for (size, color, shape), n in groups.items()]
    parts += [scene.relation or "", f'"{scene.word}"' if scene.word else "", scene.style or ""]
    return "; ".join(p for p in parts if p) + f" on {scene.background}"
