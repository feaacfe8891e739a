"""What people are shown: the pairs of a data set, or the images of a run's checkpoints side by side."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError
from rlhf_img.training.pairs import read_pairs

DEFAULT_COUNT = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Two images of a prompt to be compared."""

    id: str
    """Of prompt and images: the same wherever they come from."""
    prompt: str
    images: tuple[bytes, bytes]
    names: tuple[str, str]
    """What made each image; not shown to those who judge."""
    on_policy: bool | None = None

    def left_image(self, annotator: str) -> int:
        """The number of the image that this person sees on the left: by chance, and the same after a reload."""
        return hashlib.sha256(f"{self.id} {annotator}".encode()).digest()[0] % 2


def read_candidates(path: Path, count: int = DEFAULT_COUNT) -> list[Candidate]:
    """At most `count` comparisons of a run's folder or of a data set of pairs, in an order drawn by their content.

    Raises RlhfImgError if there is nothing to compare.
    """
    found = _of_run(path) if (path / "samples").is_dir() else _of_pairs(path)
    candidates = {candidate.id: candidate for candidate in islice(found, count)}
    if not candidates:
        raise RlhfImgError(f"{path} holds nothing to compare: give a run with two sets of samples, or a set of pairs")
    return sorted(candidates.values(), key=lambda candidate: candidate.id)


def batch_of(candidates: Sequence[Candidate]) -> str:
    """A name for exactly these."""
    return hashlib.sha256("\n".join(candidate.id for candidate in candidates).encode()).hexdigest()[:16]


def wanted(candidates: Sequence[Candidate], people: int, share_twice: float) -> dict[str, int]:
    """By how many people each is to be judged: `people`, and a share of them, chosen by content, by one more."""
    return {c.id: people + (int(c.id[:8], 16) < share_twice * 2**32) for c in candidates}


def _candidate(prompt: str, images: tuple[bytes, bytes], names: tuple[str, str], on_policy: bool | None) -> Candidate:
    digest = hashlib.sha256(b"\0".join((prompt.encode(), *images))).hexdigest()[:32]
    return Candidate(id=digest, prompt=prompt, images=images, names=names, on_policy=on_policy)


def _of_pairs(path: Path) -> Iterator[Candidate]:
    for pair in read_pairs(path):
        yield _candidate(pair.prompt, (pair.chosen, pair.rejected), ("chosen", "rejected"), pair.on_policy)


def _of_run(run: Path) -> Iterator[Candidate]:
    """Every two of the sample sets (before, during, after), prompt by prompt; identical images are left out."""
    tags = [tag for tag in ("before", *sorted(f.name for f in (run / "samples").glob("step_*")), "after")
            if (run / "samples" / tag / "samples.json").is_file()]
    rows = {tag: json.loads((run / "samples" / tag / "samples.json").read_text()) for tag in tags}
    settings = load_yaml(run / "config.yaml")["config"]
    unguided = settings["eval"]["guidance"] == 0
    for one, other in combinations(tags, 2):
        by_place = {(row["prompt"], row["seed"]): row for row in rows[other]}
        for row in rows[one]:
            if (match := by_place.get((row["prompt"], row["seed"]))) is None:
                continue
            first, second = ((run / "samples" / tag / found["file"]).read_bytes()
                             for tag, found in ((one, row), (other, match)))
            if first != second:
                yield _candidate(row["prompt"], (first, second), (one, other), unguided and other == "after")
