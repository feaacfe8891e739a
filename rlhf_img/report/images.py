"""Sample images as data URIs, and what became of each requirement between two checkpoints."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rlhf_img.report.load import Run, Sample

_LARGEST = 384
"""Longest side of an embedded image in pixels: a report stays small enough to mail."""


_LIKELY = 0.1
"""Probability from which a defect is named."""


class Verdict(NamedTuple):
    """A requirement at one prompt and seed, before and after. None: could not tell, or not looked at."""

    text: str
    before: bool | None
    after: bool | None

    @property
    def change(self) -> str:
        """ "fixed", "broken" or "" for the style sheet."""
        if self.before is None or self.after is None or self.before == self.after:
            return ""
        return "fixed" if self.after else "broken"


class Frame(NamedTuple):
    """One image of a film strip."""

    tag: str
    uri: str | None
    passed: bool | None
    """All requirements met; None where one is not known."""
    heat: str | None
    """The image under the artifact reward's heat map, where it said broken."""
    defects: tuple[tuple[str, float], ...]
    """The likeliest defects of a broken image."""


class Strip(NamedTuple):
    """One prompt and seed over the run."""

    prompt: str
    seed: int
    frames: tuple[Frame, ...]
    verdicts: tuple[Verdict, ...]
    rewards: tuple[tuple[str, float | None, float | None], ...]
    pixelated: bool

    @property
    def ends(self) -> tuple[Frame, ...]:
        """The first and the last image."""
        return self.frames if len(self.frames) == 1 else (self.frames[0], self.frames[-1])


def strips(run: Run) -> list[Strip]:
    """Every fixed prompt and seed of the first tag, in the order in which the run wrote them."""
    by_tag = {tag: {(s.prompt, s.seed): s for s in samples} for tag, samples in run.samples.items()}
    if not by_tag:
        return []
    first, *later = by_tag
    return [
        _strip(by_tag, sample, by_tag[later[-1]].get(key) if later else None) for key, sample in by_tag[first].items()
    ]


def _strip(by_tag: dict[str, dict[tuple[str, int], Sample]], before: Sample, after: Sample | None) -> Strip:
    key = (before.prompt, before.seed)
    after_passed = {r.id: r.passed for r in after.requirements} if after else {}
    after_rewards = after.rewards if after else {}
    return Strip(
        prompt=before.prompt,
        seed=before.seed,
        frames=tuple(
            _frame(tag, samples[key])
            for tag, samples in by_tag.items()
            if key in samples
        ),
        verdicts=tuple(Verdict(r.text, r.passed, after_passed.get(r.id)) for r in before.requirements),
        rewards=tuple((name, value, after_rewards.get(name)) for name, value in before.rewards.items()),
        pixelated=_side(before.image) <= 128,
    )


def _frame(tag: str, sample: Sample) -> Frame:
    heat = None if sample.heat is None else data_uri(sample.heat)
    likely = [(name, p) for name, p in sample.defects.items() if p >= _LIKELY]
    return Frame(tag_label(tag), data_uri(sample.image), all_passed(sample), heat, tuple(likely[:2]) if heat else ())


def tag_label(tag: str) -> str:
    """A tag for people: "step_000020" is "step 20"."""
    prefix, _, number = tag.partition("_")
    return f"{prefix} {int(number)}" if number.isdigit() else tag


def all_passed(sample: Sample) -> bool | None:
    """False as soon as one requirement fails; None where none fails but one is not known."""
    verdicts = [r.passed for r in sample.requirements]
    if any(v is False for v in verdicts):
        return False
    return None if not verdicts or None in verdicts else True


def data_uri(file: Path | io.BytesIO, largest: int = _LARGEST) -> str | None:
    """The image as a data URI, at most `largest` px a side; None if there is no readable image."""
    try:
        with Image.open(file) as image:
            image.load()
            picture = image.convert("RGB")
    except OSError:
        return None
    small = max(picture.size) <= largest
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _side(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return max(image.size)
    except OSError:
        return 0
