"""What a scene of the playground is, and how one is drawn at random: no pixels here, and no words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeVar

import numpy as np

_T = TypeVar("_T")

SIZE = 64
"""Side of an image in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (245, 215, 60),
    "green": (46, 160, 67),
    "cyan": (64, 200, 220),
    "blue": (40, 80, 210),
    "purple": (130, 50, 170),
    "pink": (245, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (20, 20, 20),
    "brown": (110, 75, 45),
}
STYLES = ("film grain", "soft focus", "vignette")
STYLED = 0.12
"""Share of scenes in one of these styles."""
WORDS = ("GO", "HI", "NO", "UP", "SUN", "CAT", "BUS", "TEA", "OPEN", "STOP", "LOVE", "MOON")
RELATIONS = ("left of", "right of", "above", "below")
RADII = {"small": 8.0, "medium": 10.0, "large": 13.0}
"""Radius of the circle with an object's nominal extent, in pixels."""
CELL = 8
"""Side in pixels of the cells that objects are centred in: those of the autoencoder's latents. Free positions and radii
cost the small model most of its capacity, and no prompt asks for them."""

Split = Literal["train", "val", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "val", "heldout")


@cache
def split_of(color: str, shape: str, background: str) -> Split:
    """The split that owns a combination: 32 of 160 are held out, and 4 (colour, shape) pairs on any background are val.

    Every pair that is not val is trained on at least three backgrounds; a held-out prompt asks for one on the fourth.
    """
    i, j, k = list(COLORS).index(color), SHAPES.index(shape), list(BACKGROUNDS).index(background)
    if (2 * i + j) % 5 == 1 and i % 2 == 0:
        return "val"
    return "heldout" if (2 * i + j + k) % 5 == 0 else "train"


@cache
def pairs_of(split: Split, background: str) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) pairs that a split owns on a background."""
    return tuple((c, s) for c in COLORS for s in SHAPES if split_of(c, s, background) == split)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object: a coloured shape with its centre and radius in pixels."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The exact truth of an image. `things[0]` is the subject of `relation`, `things[1]` its object."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None
    word: str | None = None
    word_at_top: bool = False
    style: str | None = None


_KINDS = ("single", "count", "pair", "relation", "mixed", "word")
_KIND_WEIGHTS = (0.20, 0.26, 0.20, 0.10, 0.08, 0.16)
WORD_BAND = 20
"""Height in pixels of the strip that a word takes at the top or the bottom."""


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of them: what `rng.choice` draws, sooner."""
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, split: Split = "train", styled: float = STYLED) -> Scene:
    """A random scene of a split. Outside `train`, the first thing is a combination that training never shows,
    and no scene holds a combination of the other unseen split."""
    kind = str(rng.choice(_KINDS, p=_KIND_WEIGHTS))
    while True:
        scene = _try_scene(rng, kind, split, styled)
        if scene is not None:
            return scene


def _try_scene(rng: np.random.Generator, kind: str, split: Split, styled: float) -> Scene | None:
    background = pick(rng, tuple(BACKGROUNDS))
    kinds_of_thing = _draw_pairs(rng, split, background)
    counts: tuple[int, ...]
    match kind:
        case "count":
            counts = (int(rng.integers(2, 5)),)
        case "pair" | "relation":
            counts = (1, 1)
        case "mixed":
            counts = (int(rng.integers(2, 4)), 1)
        case _:
            counts = (1,)
    crowded = sum(counts) > 2 or kind == "word"
    things: list[Thing] = []
    relation = pick(rng, RELATIONS) if kind == "relation" else None
    word = pick(rng, WORDS) if kind == "word" else None
    word_at_top = bool(rng.random() < 0.5)
    for (color, shape), count in zip(kinds_of_thing, counts, strict=False):
        size = pick(rng, ("small", "medium") if crowded else tuple(RADII))
        for _ in range(count):
            thing = _place(rng, things, color, shape, size, relation, word, word_at_top)
            if thing is None:
                return None
            things.append(thing)
    visible = STYLES if background != "black" else STYLES[:2]  # a vignette does not show on black
    return Scene(
        things=tuple(things),
        background=background,
        relation=relation,
        word=word,
        word_at_top=word_at_top,
        style=pick(rng, visible) if rng.random() < styled else None,
    )


def _draw_pairs(rng: np.random.Generator, split: Split, background: str) -> list[tuple[str, str]]:
    """Two different (colour, shape) pairs, the first from `split` and the second from `split` or `train`."""
    first = pick(rng, pairs_of(split, background))
    return [first, pick(rng, _partners(split, background, first))]


@cache
def _partners(split: Split, background: str, first: tuple[str, str]) -> list[tuple[str, str]]:
    """What may stand beside a first thing."""
    return sorted({*pairs_of("train", background), *pairs_of(split, background)} - {first})


@cache
def _centres(low: float, high: float) -> tuple[float, ...]:
    """Centres of the cells from `low` to `high`, in pixels."""
    return tuple(x for x in np.arange(CELL / 2, SIZE, CELL).tolist() if low <= x <= high)


def _place(
    rng: np.random.Generator,
    others: list[Thing],
    color: str,
    shape: str,
    size: str,
    relation: str | None,
    word: str | None,
    word_at_top: bool,
) -> Thing | None:
    """A thing that neither touches the border, the word's strip or another thing; None after 40 tries."""
    radius = RADII[size]
    low, high = radius + 2, SIZE - radius - 2
    top = low + (WORD_BAND if word and word_at_top else 0)
    bottom = high - (WORD_BAND if word and not word_at_top else 0)
    for _ in range(40):
        x, y = pick(rng, _centres(low, high)), pick(rng, _centres(top, bottom))
        if any(math.hypot(x - o.x, y - o.y) < radius + o.radius + 4 for o in others):
            continue
        thing = Thing(shape=shape, color=color, size=size, x=x, y=y, radius=radius)
        if relation and others and not holds(relation, others[0], thing):
            continue
        return thing
    return None


def splits_of(scene: Scene) -> set[Split]:
    """The splits that own what the scene shows."""
    return {split_of(t.color, t.shape, scene.background) for t in scene.things}


def holds(relation: str, subject: Thing, other: Thing) -> bool:
    """Whether `subject` is `relation` `other`, clearly: 16 px apart along its axis and at most 12 px off it."""
    dx, dy = other.x - subject.x, other.y - subject.y
    along, off = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along >= 16 and abs(off) <= 12


def break_scene(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """The scene with exactly one thing about it changed, and what: colour, shape, count, size, relation,
    background, word or style. The new value is never one the scene already has for that fact."""
    ways = ["color", "shape", "background"]
    ways += ["count"] if not scene.relation else []  # a relation is between exactly two
    ways += ["size"] if all(t.size != "medium" for t in scene.things) else []
    ways += ["relation"] if scene.relation else []
    ways += ["word"] if scene.word else []
    ways += ["style"] if scene.style else []
    way = pick(rng, ways)
    first = scene.things[0]
    same = [t for t in scene.things if (t.color, t.shape) == (first.color, first.shape)]

    def other(options: Iterable[str], *used: str | None) -> str:
        return pick(rng, [o for o in options if o not in used])

    def change(**fields: object) -> tuple[Thing, ...]:
        return tuple(replace(t, **fields) if t in same else t for t in scene.things)  # type: ignore[arg-type]

    match way:
        case "color":
            return replace(scene, things=change(color=other(COLORS, *(t.color for t in scene.things)))), way
        case "shape":
            return replace(scene, things=change(shape=other(SHAPES, *(t.shape for t in scene.things)))), way
        case "background":
            return replace(scene, background=other(BACKGROUNDS, scene.background)), way
        case "word":
            return replace(scene, word=other(WORDS, scene.word)), way
        case "style":
            return replace(scene, style=None), way
        case "relation":
            a, b, *rest = scene.things
            swapped = (replace(a, x=b.x, y=b.y, radius=min(a.radius, b.radius)),
                       replace(b, x=a.x, y=a.y, radius=min(a.radius, b.radius)), *rest)
            return replace(scene, things=swapped), way
        case "size":
            size = "small" if first.size == "large" else "large"
            return replace(scene, things=change(size=size, radius=RADII[size])), way
        case _:
            return _change_count(scene, same, rng), way


def _change_count(scene: Scene, same: list[Thing], rng: np.random.Generator) -> Scene:
    """One more of the first kind of thing if there is room, else one fewer."""
    if len(scene.things) < 4:
        more = _place(rng, list(scene.things), same[0].color, same[0].shape, "small", None,
                      scene.word, scene.word_at_top)
        if more is not None:
            return replace(scene, things=(*scene.things, replace(more, size=same[0].size)))
    return replace(scene, things=tuple(t for t in scene.things if t is not same[-1]))
