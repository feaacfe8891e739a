"""What the playground's judge learns from: images, questions of every kind of check, and their right answers.

Of a render the scene is the truth: the checks are run on what it says, not on pixels. Of a damaged render, and of an
image that the embedded model drew, the truth is what the exact checks find in the pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np

from rlhf_img.judges.protocol import QUESTION
from rlhf_img.playground.judge_build import GRID
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import (
    BACKGROUNDS,
    COLORS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    STYLES,
    WORDS,
    Scene,
    Split,
    Thing,
    pairs_of,
    sample_scene,
    splits_of,
)
from rlhf_img.rewards.defects import CLASSES, inject, parts_of
from rlhf_img.rubrics import vision
from rlhf_img.rubrics.checks import find_check
from rlhf_img.rubrics.questions import question_of
from rlhf_img.rubrics.schema import Requirement
from rlhf_img.rubrics.vision import Analysis, analyze

KINDS = ("object", "count", "color", "size", "relation", "background", "style", "text")
_WEIGHTS = dict(zip(KINDS, (1.0, 1.5, 1.0, 1.0, 2.0, 0.5, 0.7, 1.0), strict=True))
"""How often each kind is asked where it can be: what is hard to learn, more often."""
_UNSURE = 0.08
"""Of a render, no question is asked whose score is nearer than this to 0.5: there a pixel's error turns the verdict."""
_WORD_SHARE, _STYLE_SHARE = 0.15, 0.15
"""Least shares of scenes with a word and with a style, without which no such question has the answer yes."""

SUFFIX = QUESTION.removeprefix("{question}")
"""What every question ends with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """An image, uint8 (64, 64, 3), with questions about it and their answers; `scene` only if it shows just that."""

    image: np.ndarray
    questions: tuple[tuple[Requirement, bool], ...]
    scene: Scene | None = None


def asked_render(rng: np.random.Generator, split: Split, questions: int) -> Asked:
    """A random scene drawn cleanly, with so many questions, about half of them with the answer yes."""
    scene = _scene(rng, split)
    asked = draw_questions(scene, told_analysis(scene), rng, questions, margin=_UNSURE)
    return Asked(image=render(scene, int(rng.integers(2**31))), questions=asked, scene=scene)


def asked_damaged(rng: np.random.Generator, split: Split, questions: int) -> Asked:
    """A random scene with a structural defect; the exact checks on its pixels give the answers."""
    while True:
        scene = replace(_scene(rng, split), style=None)
        name = CLASSES[rng.integers(len(CLASSES))]
        image = inject(name, render(scene), parts_of(scene, name), rng)
        if image is not None:
            return asked_image(image, scene, rng, questions)


def asked_image(image: np.ndarray, meant: Scene, rng: np.random.Generator, questions: int) -> Asked:
    """Questions about an image that should show a scene; the exact checks on its pixels give the answers."""
    return Asked(image=image, questions=draw_questions(meant, analyze(image), rng, questions))


def _scene(rng: np.random.Generator, split: Split) -> Scene:
    scene = sample_scene(rng, split)
    with_word = rng.random() < _WORD_SHARE
    while with_word and scene.word is None:
        scene = sample_scene(rng, split)
    if rng.random() < _STYLE_SHARE:
        styles = STYLES if scene.background != "black" else STYLES[:2]  # a vignette does not show on black
        scene = replace(scene, style=str(rng.choice(styles)))
    return scene


def told_analysis(scene: Scene) -> Analysis:
    """What perfect vision would find in a scene's image."""
    things = tuple(
        vision.Thing(
            rgb=COLORS[t.color], color=t.color, box=(0.0, 0.0, 1.0, 1.0), x=t.x / SIZE, y=t.y / SIZE,
            radius=t.radius / SIZE, shapes={shape: float(shape == t.shape) for shape in SHAPES},
        )
        for t in scene.things
    )  # fmt: skip
    known = Analysis(
        image=np.zeros((0, 0, 3), np.uint8), background=BACKGROUNDS[scene.background], things=things, text_box=None,
        blur=1.6 if scene.style == "soft focus" else 0.3, noise=14.0 if scene.style == "film grain" else 0.0,
        corner_shade=0.45 if scene.style == "vignette" else 1.0,
    )  # fmt: skip
    vars(known)["text"] = (scene.word or "", 1.0)  # the cached property, so that no pixels are read
    return known


def draw_questions(
    scene: Scene, truth: Analysis, rng: np.random.Generator, count: int, margin: float = 0.0
) -> tuple[tuple[Requirement, bool], ...]:
    """`count` different requirements with whether they are met, about half of them, of kinds drawn by weight.

    They name what the scene holds, and what differs from it in one value: another colour, shape, number, order, ...
    A requirement that needs a thing that is not there is not among them, as it has no right answer.
    """
    found: dict[Requirement, bool] = {}
    answer = _Answers(truth, margin)
    kinds = _kinds_of(scene, rng)
    shares = np.cumsum([_WEIGHTS[kind] for kind in kinds])
    for _ in range(50 * count):
        if len(found) == count:
            break
        kind = kinds[int(np.searchsorted(shares, rng.random() * shares[-1]))]
        want = bool(rng.random() < 0.5)
        for _ in range(16):
            candidate = _candidate(kind, scene, rng)
            if candidate is not None and candidate not in found and answer.of(candidate) is want:
                found[candidate] = want
                break
    return tuple(found.items())


class _Answers:
    """What is true of an image, each requirement checked once."""

    def __init__(self, truth: Analysis, margin: float = 0.0) -> None:
        self._truth, self._margin = truth, margin
        self._known: dict[Requirement, bool | None] = {}

    def of(self, requirement: Requirement) -> bool | None:
        """Whether it is met; None if that cannot be told, or a thing that it is about is not there."""
        if requirement not in self._known:
            self._known[requirement] = self._find(requirement)
        return self._known[requirement]

    def _find(self, requirement: Requirement) -> bool | None:
        r = requirement
        names = () if r.check in ("object", "text") else (r.target, r.subject, r.object)
        if not all(self.of(_requirement("object", target=name)) for name in names if name is not None):
            return None
        score = find_check(r.check)(r, self._truth).score
        return None if score is None or abs(score - 0.5) < self._margin else score >= 0.5


def _kinds_of(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The kinds that can be asked with either answer; of words and styles that are not there, only sometimes."""
    kinds = ["object", "count", "color", "size", "background"]
    kinds += ["relation"] if len({(t.color, t.shape) for t in scene.things}) > 1 else []
    kinds += ["style"] if scene.style or rng.random() < 0.03 else []
    kinds += ["text"] if scene.word or rng.random() < 0.03 else []
    return kinds


def _candidate(kind: str, scene: Scene, rng: np.random.Generator) -> Requirement | None:
    """A requirement of a kind, met or not; None where the draw gives nothing that may be asked."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    thing = scene.things[int(rng.integers(len(scene.things)))]
    others = [t for t in scene.things if (t.color, t.shape) != (thing.color, thing.shape)]
    other = others[int(rng.integers(len(others)))] if others else thing
    match kind:
        case "object" | "color":
            color, shape = _binding(thing, other, rng)
            # A combination that training never shows must not be one that is only asked about, with the answer no.
            if (color, shape) not in _askable(scene.background, frozenset(splits_of(scene))):
                return None
            if kind == "color":
                return _requirement("color", target=shape, equals=color)
            return _requirement("object", target=shape if rng.random() < 0.4 else f"{color} {shape}")
        case "count":
            return _requirement("count", target=_handle(thing, scene, rng), equals=int(rng.integers(1, 5)))
        case "size":
            return _requirement("size", target=_handle(thing, scene, rng), equals=pick(list(RADII)))
        case "relation":
            subject, object_ = _handle(thing, scene, rng), _handle(other, scene, rng)
            return _requirement("relation", subject=subject, relation=pick(RELATIONS), object=object_)
        case "background":
            return _requirement("background", equals=pick(list(BACKGROUNDS)))
        case "style":
            return _requirement("style", equals=pick(STYLES))
        case _:
            return _requirement("text", equals=scene.word if scene.word and rng.random() < 0.5 else pick(WORDS))


@lru_cache
def _askable(background: str, splits: frozenset[Split]) -> frozenset[tuple[str, str]]:
    return frozenset(pair for split in {"train", *splits} for pair in pairs_of(split, background))


def _binding(thing: Thing, other: Thing, rng: np.random.Generator) -> tuple[str, str]:
    """A thing's colour and shape; or one of the two is another thing's, or any."""
    color, shape = thing.color, thing.shape
    match int(rng.integers(5)):
        case 0:
            color = other.color
        case 1:
            color = str(rng.choice(list(COLORS)))
        case 2:
            shape = other.shape
        case 3:
            shape = str(rng.choice(SHAPES))
    return color, shape


def _handle(thing: Thing, scene: Scene, rng: np.random.Generator) -> str:
    """What a rubric calls a thing: its shape, with its colour where another of that shape has another, or at random."""
    rivals = any(t.shape == thing.shape and t.color != thing.color for t in scene.things)
    return f"{thing.color} {thing.shape}" if rivals or rng.random() < 0.3 else thing.shape


@lru_cache(maxsize=65536)
def _requirement(check: str, **arguments: str | int) -> Requirement:
    return Requirement.model_validate({"id": check, "check": check, **arguments})


@lru_cache(maxsize=65536)
def question_text(requirement: Requirement) -> str:
    """The question as a judge is asked it, with the words that all of them end with."""
    return QUESTION.format(question=question_of(requirement))


def all_words() -> Iterator[str]:
    """Questions that hold every word of the playground's questions, for the tokenizer."""
    names = [*SHAPES, *(f"{color} {shape}" for color, shape in product(COLORS, SHAPES))]
    asked = [_requirement("object", target=name) for name in names]
    asked += [_requirement("count", target=name, equals=n) for name in names for n in range(1, 5)]
    asked += [_requirement("color", target=shape, equals=color) for color, shape in product(COLORS, SHAPES)]
    asked += [_requirement("size", target=name, equals=size) for name in names for size in RADII]
    asked += [_requirement("relation", subject=name, relation=r, object=name) for name in names for r in RELATIONS]
    asked += [_requirement("background", equals=value) for value in BACKGROUNDS]
    asked += [_requirement("style", equals=style) for style in STYLES]
    asked += [_requirement("text", equals=word) for word in WORDS]
    return (question_text(requirement).removesuffix(SUFFIX) for requirement in asked)


_CELL_FACTS: tuple[tuple[object, ...], ...] = (("", 0, 1, 2, 3), ("", *SHAPES), ("", *COLORS), ("", *RADII))
_SCENE_FACTS: tuple[tuple[str, ...], ...] = (tuple(BACKGROUNDS), ("", *WORDS), ("", *STYLES))
CELL_SIZES = tuple(len(options) for options in _CELL_FACTS)
"""Classes of each fact of an image token: in which quarter of it a thing has its centre, its shape, colour, size."""
SCENE_SIZES = tuple(len(options) for options in _SCENE_FACTS)
"""Classes of each fact of an image: background, word, style."""


def seen_facts(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What there is to see: a class for each fact of each image token, int64 (16, 4), and of the image, (3,)."""
    cells = np.zeros((GRID * GRID, len(CELL_SIZES)), np.int64)
    step = SIZE / GRID
    for t in scene.things:
        quarter = int(t.y % step >= step / 2) * 2 + int(t.x % step >= step / 2)
        values = (quarter, t.shape, t.color, t.size)
        place = int(t.y // step) * GRID + int(t.x // step)
        cells[place] = [options.index(v) for options, v in zip(_CELL_FACTS, values, strict=True)]
    told = (scene.background, scene.word or "", scene.style or "")
    return cells, np.array([options.index(v) for options, v in zip(_SCENE_FACTS, told, strict=True)])
