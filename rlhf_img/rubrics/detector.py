"""Requirements scored by an open-vocabulary object detector of transformers: OWLv2, OWL-ViT or Grounding DINO.

    >>> from rlhf_img.rubrics.detector import DetectorConfig, open_detector
    >>> detector = open_detector(DetectorConfig(model="google/owlv2-base-patch16-ensemble"))
    >>> detector.detect([image], [["cat", "neon sign"]])[0]["cat"][0].score
    0.61

torch and transformers are imported when a detector is opened.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from rlhf_img.errors import RlhfImgError
from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.checks import CheckResult, all_of, as_expected, count_score, relation_score
from rlhf_img.rubrics.schema import Requirement
from rlhf_img.rubrics.vision import Box
from rlhf_img.rubrics.words import english

SERVED = f"object, count and relation ({', '.join(dict.fromkeys(lexicon.RELATIONS.values()))})"
"""The requirements that a detector can tell."""
MOST_BOXES = 300
"""Boxes that are kept of a noun."""
NEARLY = 0.25
"""Presence from which on a box counts in part, where it is not enough to be the noun."""
_OWL = ("owlvit", "owlv2")
_GROUNDING = ("grounding-dino", "mm-grounding-dino")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Which detector, and how its boxes are read."""

    model: str
    """The folder or name that transformers loads it from: an OWLv2, OWL-ViT or Grounding DINO."""
    threshold: float = 0.2
    """Score in (0, 1) from which on a box is the noun. Each model has its own scale: look at some images first."""
    nms_iou: float = 0.5
    """Of two boxes of a noun whose intersection is more than this share of their union, the better one is kept."""
    batch_size: int = 8
    """Images in one forward pass; only those of one size with the same nouns go together."""
    device: str | None = None
    """Where it runs, such as cpu or cuda:1. null: on a GPU if there is one."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is between 0 and 1; given {self.threshold}")
        if not 0 <= self.nms_iou <= 1:
            raise ValueError(f"nms_iou is a share in [0, 1]; given {self.nms_iou}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is at least 1; given {self.batch_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """A box, as fractions of the image, and its score in [0, 1]."""

    score: float
    box: Box


Seen = Mapping[str, Sequence[Detection]]
"""Noun -> its boxes, best first. A noun that the detector had no room for is left out."""


@runtime_checkable
class Detector(Protocol):
    """Finds things by name."""

    config: DetectorConfig

    def detect(self, images: Sequence[npt.NDArray[np.uint8]], nouns: Sequence[Sequence[str]]) -> list[Seen]:
        """What is seen of each image's nouns. Each box is given to the noun that it scores highest for.

        images: uint8 (H, W, 3), RGB.
        """


class LocalDetector:
    """A detector in this process.

    A batch holds images of one size with the same nouns: nothing is padded, and no score depends on the others.
    """

    def __init__(self, model: Any, processor: Any, config: DetectorConfig) -> None:
        """Raises RlhfImgError if the model is of a family that is not known here."""
        self._model, self._processor, self.config = model.eval(), processor, config
        family = model.config.model_type
        if family not in (*_OWL, *_GROUNDING):
            raise RlhfImgError(f"{config.model} is of the family {family}; give an OWLv2, OWL-ViT or Grounding DINO")
        self._is_owl = family in _OWL

    @classmethod
    def load(cls, config: DetectorConfig) -> "LocalDetector":
        """From a folder or the hub, in float32. Raises RlhfImgError if it is no detector or the device is not there."""
        import torch
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model, loaded = AutoModelForZeroShotObjectDetection.from_pretrained(
                config.model, dtype=torch.float32, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(config.model, backend="pil")
        except (OSError, ValueError) as error:
            raise RlhfImgError(
                f"the detector {config.model} cannot be loaded: {error}. Give a folder or the name of an OWLv2, "
                "OWL-ViT or Grounding DINO, such as google/owlv2-base-patch16-ensemble"
            ) from error
        if missing := sorted(key for key in loaded["missing_keys"] if "box" in key):
            raise RlhfImgError(
                f"{config.model} has no weights for {missing[0]}: it is a detector without the part that makes boxes. "
                "Give the whole one, such as google/owlv2-base-patch16-ensemble"
            )
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise RlhfImgError(f"the detector cannot run on {device}: {error}. Give another device, or none") from error
        return cls(model, processor, config)

    def detect(self, images: Sequence[npt.NDArray[np.uint8]], nouns: Sequence[Sequence[str]]) -> list[Seen]:
        alike: dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]] = {}
        for place, (image, words) in enumerate(zip(images, nouns, strict=True)):
            alike.setdefault((image.shape, tuple(sorted(set(words)))), []).append(place)
        seen: dict[int, Seen] = {}
        for (_, words), places in alike.items():
            for start in range(0, len(places), self.config.batch_size):
                batch = places[start : start + self.config.batch_size]
                seen |= zip(batch, self._detect_batch([images[place] for place in batch], words), strict=True)
        return [seen[place] for place in range(len(images))]

    def _detect_batch(self, images: Sequence[npt.NDArray[np.uint8]], nouns: tuple[str, ...]) -> list[Seen]:
        import torch

        height, width = images[0].shape[:2]
        text, columns = self._text(nouns)
        if not columns:
            return [{} for _ in images]
        inputs = self._processor(
            images=[Image.fromarray(image) for image in images], text=[text] * len(images), return_tensors="pt",
            text_kwargs=self._text_limit,
        )  # fmt: skip
        with torch.inference_mode():
            outputs = self._model(**inputs.to(self._model.device))
            logits = outputs.logits  # (images, boxes, nouns), or tokens in place of nouns
            if not self._is_owl:
                # The mean over a noun's tokens, as GLIP does (Li et al. 2022): "red" and "blue" tell two stars apart.
                p = logits.sigmoid()
                logits = torch.stack([p[..., tokens].mean(-1) for tokens in columns.values()], -1).logit()
        # The image processor knows what its model's boxes are fractions of; OWLv2's are of a square, padded at the
        # right or at the bottom. It gives pixels of the image, and to each box the noun with the highest score.
        results = self._processor.image_processor.post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=outputs.pred_boxes), threshold=0.0,
            target_sizes=[(height, width)] * len(images),
        )  # fmt: skip
        return [_seen(result, tuple(columns), width, height) for result in results]

    @property
    def _text_limit(self) -> dict[str, Any]:
        config = self._model.config
        longest = config.text_config.max_position_embeddings if self._is_owl else config.max_text_len
        return {"truncation": True, "max_length": longest}

    def _text(self, nouns: tuple[str, ...]) -> tuple[list[str] | str, dict[str, list[int]]]:
        """What the model is told, and the columns of its logits for each noun that it has room for."""
        if self._is_owl:
            return [f"a photo of {english().a(noun)}" for noun in nouns], {n: [i] for i, n in enumerate(nouns)}
        text, spans = "", {}
        for noun in nouns:
            start = len(text)
            text += re.sub(r"[.?]", " ", noun.lower()).strip()  # these two end a phrase
            spans[noun] = (start, len(text))
            text += ". "
        read = self._processor.tokenizer(text, return_offsets_mapping=True, **self._text_limit)["offset_mapping"]
        columns = {
            noun: [place for place, (left, right) in enumerate(read) if start <= left < right <= end]
            for noun, (start, end) in spans.items()
        }
        return text, {noun: tokens for noun, tokens in columns.items() if tokens}


def _seen(result: Mapping[str, Any], nouns: tuple[str, ...], width: int, height: int) -> Seen:
    """The boxes of an image, from pixels (boxes, 4) to fractions of the image; what lies beside it is left out."""
    boxes = (result["boxes"].cpu().double().numpy() / [width, height, width, height]).clip(0, 1)
    seen: dict[str, list[Detection]] = {noun: [] for noun in nouns}
    rows = zip(result["scores"].tolist(), result["labels"].tolist(), boxes.tolist(), strict=True)
    for score, label, (left, top, right, bottom) in sorted(rows, key=lambda row: -row[0]):
        kept = seen[nouns[label]]
        if left < right and top < bottom and len(kept) < MOST_BOXES:
            kept.append(Detection(score=score, box=(left, top, right, bottom)))
    return seen


@lru_cache(maxsize=1)
def open_detector(config: DetectorConfig) -> LocalDetector:
    """The detector of a config, loaded once. Raises RlhfImgError if it cannot be opened."""
    return LocalDetector.load(config)


def ask_detector(
    detector: Detector, images: Sequence[npt.NDArray[np.uint8]], questions: Sequence[tuple[int, Requirement]]
) -> list[CheckResult]:
    """A result for each requirement of an image, given by its place in `images`, uint8 (H, W, 3), RGB.

    An image is looked at once, for all nouns of its requirements. A requirement that no boxes can tell is unscored.
    """
    nouns: dict[int, list[str]] = {}
    for place, requirement in questions:
        if wanted := _nouns(requirement):
            nouns.setdefault(place, []).extend(wanted)
    seen = detector.detect([images[place] for place in nouns], list(nouns.values())) if nouns else []
    of_place = dict(zip(nouns, seen, strict=True))
    return [
        score_boxes(requirement, of_place.get(place, {}), images[place].shape[:2], detector.config)
        for place, requirement in questions
    ]


def _nouns(requirement: Requirement) -> tuple[str, ...]:
    """What has to be looked for; nothing where a detector cannot tell."""
    match requirement.check:
        case "object" | "count":
            return (str(requirement.target),)
        case "relation" if requirement.relation in lexicon.RELATIONS:
            return (str(requirement.subject), str(requirement.object))
    return ()


def score_boxes(requirement: Requirement, seen: Seen, size: tuple[int, ...], config: DetectorConfig) -> CheckResult:
    """The score in [0, 1] of a requirement by what was seen on an image of the size (H, W).

    None, with the reason in the evidence, for what is not `SERVED` and for nouns that the detector had no room for.
    """
    nouns = _nouns(requirement)
    if not nouns:
        return CheckResult(score=None, evidence=f"a detector cannot tell this, a judge can; a detector tells {SERVED}")
    if left_out := [noun for noun in nouns if noun not in seen]:
        return CheckResult(score=None, evidence=f"the detector's text had no room for {left_out[0]!r}; ask for less")
    things = [things_of(seen[noun], config) for noun in nouns]
    hits = [[thing for thing in found if thing.score >= 0.5] for found in things]
    presence = min(found[0].score if found else 0.0 for found in things)
    match requirement.check:
        case "count":
            score = count_score([thing.score for thing in things[0]], cast(int, requirement.equals))
        case "relation":
            chosen = [some or found[:1] for some, found in zip(hits, things, strict=True)]
            # capped as by `needs`: what is not there stands in no relation
            score = min(presence, _relation(chosen[0], lexicon.RELATIONS[str(requirement.relation)], chosen[1], size))
        case _:
            score = as_expected(presence, requirement)
    best = [max((d.score for d in seen[noun]), default=0.0) for noun in nouns]
    said = [f"{len(h)} {noun} (best score {top:.2f})" for noun, h, top in zip(nouns, hits, best, strict=True)]
    evidence = f"{config.model} at {config.threshold:g}: {', '.join(said)}"
    return CheckResult(score=score, evidence=evidence, boxes=tuple(thing.box for some in hits for thing in some))


def presence_of(score: float, threshold: float) -> float:
    """A detector's score with its log-odds moved so that 0.5 is at the threshold; 0 stays 0 and 1 stays 1."""
    there, gone = score * (1 - threshold), threshold * (1 - score)
    return there / (there + gone)


def things_of(found: Sequence[Detection], config: DetectorConfig) -> list[Detection]:
    """One box for each thing that is the noun or nearly, at least the best one; scored by presence, best first."""
    scored = [Detection(score=presence_of(d.score, config.threshold), box=d.box) for d in found]
    scored.sort(key=lambda thing: -thing.score)
    kept: list[Detection] = []
    for thing in [t for t in scored if t.score >= NEARLY] or scored[:1]:
        if all(_overlap(thing.box, other.box) <= config.nms_iou for other in kept):
            kept.append(thing)
    return kept


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _relation(subjects: list[Detection], relation: str, others: list[Detection], size: tuple[int, ...]) -> float:
    """That every subject stands in the relation to every other thing, from centre to centre."""
    height, width = size
    scale = 0.5 / max(height, width)
    centres = [
        [((d.box[0] + d.box[2]) * width * scale, (d.box[1] + d.box[3]) * height * scale) for d in found]
        for found in (subjects, others)
    ]
    return all_of([relation_score(relation, bx - ax, by - ay) for ax, ay in centres[0] for bx, by in centres[1]])
