"""Varied English for a scene. A caption may leave a fact out; it never says a false one."""

import numpy as np

from rlhf_img.playground.scene import Scene, Thing, pick, splits_of

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big")}
COUNT_WORDS = {2: ("two", "a pair of", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
STYLE_WORDS = {
    "film grain": ("with film grain", "grainy film"),
    "soft focus": ("in soft focus", "soft focus"),
    "vignette": ("with a vignette", "with dark vignette corners"),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One English description. Size and background are mentioned sometimes, all else always; a background without which
    the prompt could be one of training is mentioned too."""

    groups: list[list[Thing]] = []
    for thing in scene.things:
        if groups and (groups[-1][0].color, groups[-1][0].shape) == (thing.color, thing.shape):
            groups[-1].append(thing)
        else:
            groups.append([thing])
    phrases = [_phrase(group, rng) for group in groups]
    if scene.relation:
        text = f"{phrases[0]} {pick(rng, RELATION_WORDS[scene.relation])} {phrases[1]}"
    else:
        text = " and ".join(phrases)
    if scene.word:
        text += f' and the {pick(rng, ("word", "text"))} "{scene.word}"'
    if rng.random() < 0.6 or "heldout" in splits_of(scene):
        ground = pick(rng, ("gray", "grey", "grey")) if scene.background == "grey" else scene.background
        text += pick(rng, (f" on a {ground} background", f" on {ground}", f" against a {ground} background"))
    if scene.style:
        text += f", {pick(rng, STYLE_WORDS[scene.style])}"
    return pick(rng, ("", "", "", "a picture of ", "an image of ")) + text


def plural(noun: str) -> str:
    """The plural of a word for a shape."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _phrase(group: list[Thing], rng: np.random.Generator) -> str:
    """A counted noun phrase: "two large red circles"."""
    say_size = rng.random() < 0.6
    first = group[0]
    noun = pick(rng, SHAPE_WORDS[first.shape])
    words = [first.color]
    if say_size and first.size in SIZE_WORDS:
        words.insert(0, pick(rng, SIZE_WORDS[first.size]))
    if len(group) > 1:
        return " ".join([pick(rng, COUNT_WORDS[len(group)]), *words, plural(noun)])
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)} {noun}"
