"""The words that the grammar and the checks know: numbers, sizes, colours, shapes, relations and styles."""

from dataclasses import dataclass

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 42, 40),
    "orange": (245, 130, 32),
    "yellow": (245, 215, 60),
    "green": (46, 160, 67),
    "cyan": (64, 200, 220),
    "blue": (40, 80, 210),
    "purple": (130, 50, 170),
    "pink": (245, 130, 190),
    "brown": (110, 75, 45),
    "grey": (128, 128, 128),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
"""The basic colours (8-bit sRGB) between which a colour is named by the nearest one."""

FINE_COLORS: dict[str, tuple[int, int, int]] = {
    "crimson": (180, 20, 50),
    "maroon": (115, 15, 25),
    "gold": (225, 175, 40),
    "beige": (225, 210, 175),
    "olive": (115, 115, 30),
    "lime": (140, 220, 40),
    "teal": (15, 125, 125),
    "turquoise": (64, 220, 205),
    "navy": (15, 25, 95),
    "magenta": (220, 30, 180),
    "silver": (190, 190, 195),
}
"""Finer names: each also competes with the basic colours, save those that it shades into."""

COLOR_SYNONYMS = {"gray": "grey", "violet": "purple", "aqua": "cyan", "scarlet": "red", "golden": "gold"}
NEUTRALS = ("white", "grey", "black")

SHAPE_SYNONYMS = {
    "disc": "circle",
    "disk": "circle",
    "dot": "circle",
    "box": "square",
    "plus sign": "cross",
    "plus": "cross",
}
NOUN_SYNONYMS = {**SHAPE_SYNONYMS, "people": "person", "persons": "person", "men": "man", "women": "woman"}

SIZES: dict[str, tuple[float, float]] = {"small": (0.0, 0.14), "medium": (0.14, 0.175), "large": (0.175, 1.0)}
"""Range of an object's nominal radius, as a fraction of the image side."""
SIZE_SYNONYMS = {"tiny": "small", "little": "small", "big": "large", "huge": "large", "medium-sized": "medium"}

_ONE_TO_TWELVE = "one two three four five six seven eight nine ten eleven twelve"
NUMBERS = {word: n for n, word in enumerate(_ONE_TO_TWELVE.split(), start=1)} | {
    "a": 1,
    "an": 1,
    "a single": 1,
    "single": 1,
    "a pair of": 2,
    "pair of": 2,
    "a couple of": 2,
    "a dozen": 12,
}

RELATIONS = {
    "to the left of": "left of",
    "left of": "left of",
    "on the left of": "left of",
    "to the right of": "right of",
    "right of": "right of",
    "on the right of": "right of",
    "above": "above",
    "over": "above",
    "on top of": "above",
    "below": "below",
    "under": "below",
    "underneath": "below",
    "beneath": "below",
}
"""Phrase -> the relation's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """A deliberate style: the phrases that ask for it, and the artifact classes that it permits."""

    phrases: tuple[str, ...]
    permits: tuple[str, ...]


STYLES: dict[str, Style] = {
    "film grain": Style(
        phrases=("35mm film grain", "film grain", "grainy film", "grainy", "grain", "noisy film"),
        permits=("grain", "noise"),
    ),
    "soft focus": Style(
        phrases=("soft focus", "soft-focus", "out of focus", "blurry", "blurred"),
        permits=("blur",),
    ),
    "vignette": Style(
        phrases=(
            "dark vignette corners",
            "dark vignette",
            "vignette corners",
            "vignette",
            "vignetting",
            "dark corners",
        ),
        permits=("vignette",),
    ),
}

LEAD_INS = tuple(
    f"{article} {noun} of"
    for article in ("a", "an", "the")
    for noun in ("picture", "image", "photo", "photograph", "drawing", "illustration", "painting", "rendering")
)
NEGATIONS = ("without any", "without", "no", "not any", "with no")
BACKGROUND_LEADS = ("on", "against", "in front of", "with", "over")
BACKGROUND_NOUNS = ("background", "backdrop")
TEXT_NOUNS = ("word", "words", "text", "letters", "caption", "title")
TEXT_VERBS = ("that reads", "that says", "reading", "saying", "labelled", "labeled", "spelling", "with")

_STOP_WORDS = """a an the and or nor but of in on at to by for from with without no not is are was were be being been
    it its this that these those there their his her as into onto over under above below beneath against next near
    beside behind between around through across while who which some any all each every both other another than then
    very has have having facing front inside outside left right top bottom"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that end a noun phrase and are never a noun."""

_NOUNS_IN_ING = "ring king wing string spring building painting ceiling earring clothing drawing"
NOUNS_IN_ING = frozenset(_NOUNS_IN_ING.split())
"""Nouns that look like verbs; other words in -ing end a noun phrase."""
