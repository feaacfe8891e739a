"""The checks: one function per kind of requirement, (Requirement, Analysis) -> CheckResult.

Scores are soft, so that two images that both fail can still be told apart; 0.5 is the border between yes and no, and is
crossed exactly where the hard statement changes. What a check cannot know is None, never 0.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlhf_img.errors import RlhfImgError
from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.colors import color_score, knows
from rlhf_img.rubrics.schema import Requirement
from rlhf_img.rubrics.templates import OUTLINES
from rlhf_img.rubrics.vision import Analysis, Box, Thing


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """`score` in [0, 1], or None if the check cannot tell; `boxes` show where, as fractions of the image."""

    score: float | None
    evidence: str
    boxes: tuple[Box, ...] = ()


Check = Callable[[Requirement, Analysis], CheckResult]


@dataclass(frozen=True, slots=True)
class _Target:
    """A target's noun, and the colour and size that tell it from others ("small red star")."""

    shape: str
    color: str | None
    size: str | None


def _parse_target(target: str) -> _Target | None:
    """None for what classical vision cannot recognise."""
    for name, shape in lexicon.SHAPE_SYNONYMS.items():
        if target == name or target.endswith(f" {name}"):
            target = target.removesuffix(name) + shape
    *words, noun = target.split(" ")
    color = size = None
    for word in words:
        if color is None and knows(word):
            color = word
        elif size is None and lexicon.SIZE_SYNONYMS.get(word, word) in lexicon.SIZES:
            size = lexicon.SIZE_SYNONYMS.get(word, word)
        else:
            return None
    return _Target(noun, color, size) if noun in OUTLINES else None


def _match(target: _Target, analysis: Analysis) -> list[tuple[float, Thing]]:
    """How well each thing of the image is the target, in [0, 1], best first."""
    scored = []
    for thing in analysis.things:
        scores = [thing.shapes[target.shape]]
        if target.color:
            scores.append(color_score(thing.rgb, target.color))
        if target.size:
            scores.append(_size_score(thing, target.size))
        scored.append((min(scores), thing))
    return sorted(scored, key=lambda pair: -pair[0])


def _found(target: _Target, analysis: Analysis) -> list[Thing]:
    """The things that are the target, or else the one that is nearest to it."""
    matches = _match(target, analysis)
    return [t for s, t in matches if s >= 0.5] or [t for _, t in matches[:1]]


def _unknown(what: str, known: Sequence[str]) -> CheckResult:
    return CheckResult(score=None, evidence=f"classical vision does not know {what!r} (it knows: {', '.join(known)})")


def _boxes(things: Sequence[Thing]) -> tuple[Box, ...]:
    return tuple(t.box for t in things)


def all_of(scores: Sequence[float]) -> float:
    """0.5 or more if and only if every score is; the mean where all pass, at most its half where one fails."""
    if not scores:
        return 0.0
    mean = float(np.mean(scores))
    return mean if min(scores) >= 0.5 else min(0.5 * mean, 0.49)


def _what(thing: Thing) -> str:
    shape, score = max(thing.shapes.items(), key=lambda pair: pair[1])
    return f"{thing.color} {shape if score >= 0.5 else 'something'}"


def _seen(analysis: Analysis) -> str:
    return "found " + (", ".join(_what(t) for t in analysis.things) or "nothing")


def as_expected(score: float, requirement: Requirement) -> float:
    """The score that something is there, or with `expect: absent` that it is not; at 0.5 it counts as there."""
    if requirement.expect == "present":
        return score
    return min(1 - score, 0.49) if score >= 0.5 else 1 - score


def check_object(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That at least one target is there, or with `expect: absent` none."""
    assert requirement.target is not None
    target = _parse_target(requirement.target)
    if target is None:
        return _unknown(requirement.target, tuple(OUTLINES))
    matches = _match(target, analysis)
    best = matches[0][0] if matches else 0.0
    hits = _boxes([t for s, t in matches if s >= 0.5])
    return CheckResult(score=as_expected(best, requirement), evidence=_seen(analysis), boxes=hits)


def count_score(scores: Sequence[float], wanted: int) -> float:
    """0.5 or more if and only if just `wanted` of the scores, each in [0, 1], are.

    Above, the mean distance of the scores from 0.5; below, how far their sum is off.
    """
    if sum(s >= 0.5 for s in scores) == wanted:
        return 0.5 + 0.5 * (float(np.abs(2 * np.array(scores) - 1).mean()) if scores else 1.0)
    return 0.5 * float(np.exp(-max(abs(sum(scores) - wanted), 0.1)))


def check_count(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That there are exactly `equals` targets; things that are nearly the target count in part below 0.5."""
    assert requirement.target is not None and isinstance(requirement.equals, int)
    target = _parse_target(requirement.target)
    if target is None:
        return _unknown(requirement.target, tuple(OUTLINES))
    matches = _match(target, analysis)
    score = count_score([s for s, _ in matches], requirement.equals)
    hits = _boxes([t for s, t in matches if s >= 0.5])
    return CheckResult(score=score, evidence=f"{len(hits)} of {requirement.equals}", boxes=hits)


def check_color(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That every target has the colour."""
    assert requirement.target is not None and isinstance(requirement.equals, str)
    target, color = _parse_target(requirement.target), requirement.equals
    if target is None:
        return _unknown(requirement.target, tuple(OUTLINES))
    if not knows(color):
        return _unknown(color, tuple(lexicon.COLORS))
    things = _found(target, analysis)
    score = all_of([color_score(t.rgb, color) for t in things])
    return CheckResult(score=score, evidence=_seen(analysis), boxes=_boxes(things))


def _size_score(thing: Thing, size: str) -> float:
    """0.5 at the borders of the size's range, with a slope of 1 per 4 % of the image's side."""
    low, high = lexicon.SIZES[size]
    inside = min(thing.radius - low if low > 0 else 1.0, high - thing.radius if high < 1 else 1.0)
    return float(np.clip(0.5 + inside / 0.04, 0, 1))


def check_size(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That every target has the size."""
    assert requirement.target is not None and isinstance(requirement.equals, str)
    target = _parse_target(requirement.target)
    size = lexicon.SIZE_SYNONYMS.get(requirement.equals, requirement.equals)
    if target is None:
        return _unknown(requirement.target, tuple(OUTLINES))
    if size not in lexicon.SIZES:
        return _unknown(size, tuple(lexicon.SIZES))
    things = _found(target, analysis)
    radii = ", ".join(f"{t.radius:.0%}" for t in things)
    score = all_of([_size_score(t, size) for t in things])
    return CheckResult(score=score, evidence=f"radius {radii or '-'} of the side", boxes=_boxes(things))


def relation_score(relation: str, dx: float, dy: float) -> float:
    """0.5 where the direction is 53 degrees off, or the two are 12 % of the side apart along the relation's axis.

    dx, dy: from the subject's centre to the other's, to the right and down, as fractions of the longer side.
    """
    along, off = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    angle = float(np.degrees(np.arctan2(abs(off), along)))
    direction = 1 - angle / 106 if angle < 53 else 0.5 * (180 - angle) / 127
    return min(direction, float(np.clip(0.5 + (along - 0.12) / 0.24, 0, 1)))


def check_relation(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That every subject stands in the relation to every object, from centre to centre."""
    assert requirement.subject is not None and requirement.object is not None and requirement.relation is not None
    relation = lexicon.RELATIONS.get(requirement.relation)
    if relation is None:
        return _unknown(requirement.relation, tuple(dict.fromkeys(lexicon.RELATIONS.values())))
    targets = [_parse_target(name) for name in (requirement.subject, requirement.object)]
    for name, target in zip((requirement.subject, requirement.object), targets, strict=True):
        if target is None:
            return _unknown(name, tuple(OUTLINES))
    subjects, others = (_found(cast(_Target, t), analysis) for t in targets)
    pairs = [(a, b) for a in subjects for b in others if a is not b]
    score = all_of([relation_score(relation, b.x - a.x, b.y - a.y) for a, b in pairs])
    return CheckResult(score=score, evidence=_seen(analysis), boxes=_boxes([*subjects, *others]))


def check_background(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That the background has the colour."""
    assert isinstance(requirement.equals, str)
    if not knows(requirement.equals):
        return _unknown(requirement.equals, tuple(lexicon.COLORS))
    r, g, b = analysis.background
    score = color_score(analysis.background, requirement.equals)
    return CheckResult(score=score, evidence=f"background is rgb({r:.0f}, {g:.0f}, {b:.0f})")


def _ramp(value: float, none: float, border: float, full: float) -> float:
    """Piecewise linear: 0 at `none`, 0.5 at `border`, 1 at `full`."""
    points = sorted([(none, 0.0), (border, 0.5), (full, 1.0)])
    return float(np.interp(value, [x for x, _ in points], [y for _, y in points]))


def check_style(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That a deliberate style shows: grain by pixel noise, soft focus by edge width, vignette by dark corners."""
    match requirement.equals:
        case "film grain":
            score, evidence = _ramp(analysis.noise, 0.5, 6, 11), f"noise of {analysis.noise:.1f} grey levels"
        case "soft focus":
            if analysis.blur is None:
                return CheckResult(score=None, evidence="nothing with an edge to judge focus by")
            # grain is smoothed before edges are measured, which adds about a pixel of blur
            blur = analysis.blur if analysis.noise <= 5 else max(0.0, analysis.blur - 0.5)
            score, evidence = _ramp(blur, 0.5, 1.15, 1.6), f"edges blurred by {blur:.2f} px"
        case "vignette":
            score = _ramp(analysis.corner_shade, 1.0, 0.8, 0.5)
            evidence = f"corners at {analysis.corner_shade:.0%} of the centre's brightness"
        case other:
            return _unknown(str(other), tuple(lexicon.STYLES))
    return CheckResult(score=as_expected(score, requirement), evidence=evidence)


def _edits(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def text_similarity(wanted: str, read: str, *, extra_text: str = "penalize") -> float:
    """Normalised edit similarity in [0, 1], without regard to case and to the amount of white space.

    The edits are divided by the longer of the two, so that repeating the words or burying them in others costs.
    With extra_text "ignore" the best stretch of the read text with the wanted length counts.
    """
    a, b = (" ".join(t.casefold().split()) for t in (wanted, read))
    if extra_text == "ignore" and len(b) > len(a):
        return max(text_similarity(a, b[i : i + len(a)]) for i in range(len(b) - len(a) + 1))
    return 1 - _edits(a, b) / max(len(a), len(b), 1)


def check_text(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """That the image shows the words, and by default no others. Only the whole text, letter by letter, passes."""
    read, confidence = analysis.text
    boxes = tuple(line.box for line in analysis.lines) if read else ()
    return text_result(requirement, read, confidence, boxes)


def text_result(requirement: Requirement, read: str, confidence: float, boxes: tuple[Box, ...]) -> CheckResult:
    """The result where `read` was read in `boxes`."""
    assert isinstance(requirement.equals, str)
    similarity = text_similarity(requirement.equals, read, extra_text=requirement.extra_text)
    score = 0.5 + 0.5 * confidence if similarity == 1 else 0.5 * similarity
    return CheckResult(score=score, evidence=f"reads {read!r}" if read else "no text found", boxes=boxes)


def check_vqa(requirement: Requirement, analysis: Analysis) -> CheckResult:
    """A question that only a judge can answer: unscored here."""
    return CheckResult(score=None, evidence="a question needs a judge model; none was given")


BUILTIN: dict[str, Check] = {
    "object": check_object,
    "count": check_count,
    "color": check_color,
    "relation": check_relation,
    "size": check_size,
    "background": check_background,
    "style": check_style,
    "text": check_text,
    "vqa": check_vqa,
}


@lru_cache(maxsize=128)
def find_check(name: str) -> Check:
    """The check of that name: built in, from the entry-point group `rlhf_img.checks`, or `path/to/file.py:name`.

    Raises RlhfImgError if it cannot be loaded.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    try:
        if ".py:" in name:
            return _from_file(*name.rsplit(":", 1))
        (point,) = entry_points(group="rlhf_img.checks", name=name)
        return cast(Check, point.load())
    except Exception as error:
        raise RlhfImgError(f"check {name!r} cannot be loaded: {error!r}") from error


def _from_file(path: str, name: str) -> Check:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Check, getattr(module, name))
