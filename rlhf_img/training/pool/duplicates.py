"""Prompts that say nearly the same: found by their words, and kept apart where they ask for different things."""

from collections.abc import Callable, Sequence
from functools import cache

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics import Rubric
from rlhf_img.training.pool.normal import normal_form
from rlhf_img.training.prompts import Prompt

_SHINGLE = 4
"""Signs of a piece of text that is compared."""
_HASHES = 128


def near_duplicates(
    prompts: Sequence[Prompt], similarity: float, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[int, int]:
    """Which prompts say what an earlier one says: place of each -> place of the one that stays.

    Two prompts are near duplicates if the sets of their pieces of four signs have at least this Jaccard `similarity`
    (shared pieces over all pieces), and their rubrics ask for the same: "two red cats" and "three red cats" are alike,
    and stay. Candidates are found by MinHash, which misses a few near the threshold (Broder 1997; for training data
    Lee et al. 2022, arXiv 2107.06499), and then compared exactly.

    progress: called with prompts done and in all. Raises RlhfImgError if the extra `pool` is not installed, or the
    similarity is not in (0, 1).
    """
    if not 0 < similarity < 1:
        raise RlhfImgError(f"the similarity of near duplicates is between 0 and 1; got {similarity}")
    try:
        from datasketch import MinHash, MinHashLSH
    except ModuleNotFoundError as error:
        raise RlhfImgError(f"dedup needs {error.name}, which is not installed: pip install 'rlhf-img[pool]'") from error
    index = MinHashLSH(threshold=similarity, num_perm=_HASHES)
    pieces = [_pieces(prompt.text) for prompt in prompts]

    @cache
    def wanted(place: int) -> frozenset[str]:
        return _requirements(prompts[place].rubric or rubric_of(prompts[place].text))

    found: dict[int, int] = {}
    for place, mine in enumerate(pieces):
        sketch = MinHash(num_perm=_HASHES, seed=1)
        sketch.update_batch([piece.encode() for piece in mine])
        near = sorted(other for other in index.query(sketch) if _jaccard(mine, pieces[other]) >= similarity)
        kept = next((other for other in near if wanted(other) == wanted(place)), None)
        if kept is None:
            index.insert(place, sketch)
        else:
            found[place] = kept
        progress(place + 1, len(prompts))
    return found


def _pieces(text: str) -> frozenset[str]:
    padded = f" {normal_form(text)} "
    return frozenset(padded[i : i + _SHINGLE] for i in range(max(1, len(padded) - _SHINGLE + 1)))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _requirements(rubric: Rubric) -> frozenset[str]:
    """What a rubric asks for, whatever its requirements are called and in whatever order they come."""
    return frozenset(r.model_dump_json(exclude={"id", "needs"}) for r in rubric.requirements)
