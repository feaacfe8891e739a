"""The aesthetic reward: how likely people prefer an image to an average one of those they were asked about."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.aesthetic_model import load_head
from rlhf_img.rewards.preference import card_of
from rlhf_img.rewards.protocol import Images

Scorer = Callable[[list[str], Tensor], Tensor]
"""Prompts and images to scores (B,), of which only differences mean something."""


def aesthetic(
    prompts: Sequence[str], images: Images, *, weights: str | None = None, **columns: object
) -> list[float]:
    """P(preferred to an average image of the training pairs), in [0, 1], learnt from preference pairs.

    weights: option; the file or folder that `rlhf-img reward train aesthetic` wrote. Raises RlhfImgError without it.
    """
    if weights is None:
        raise RlhfImgError(
            "aesthetic: no weights come with the package, because taste is yours: make some with rlhf-img reward train "
            "aesthetic --pairs DATA --out FILE, and give {reward: aesthetic, options: {weights: FILE}}"
        )
    scorer, centre, scale = _load(weights)
    return (scale * (scorer(list(prompts), images.tensor) - centre)).sigmoid().tolist()


aesthetic.range = (0.0, 1.0)  # type: ignore[attr-defined]
aesthetic.floor = 0.02  # type: ignore[attr-defined]
aesthetic.needs = "what rlhf-img reward train aesthetic wrote, and its backbone"  # type: ignore[attr-defined]


@lru_cache(maxsize=2)
def _load(weights: str) -> tuple[Scorer, float, float]:
    path = Path(weights)
    card = card_of(path)
    if not path.exists() or not card.is_file():
        missing = card if path.exists() else path
        raise RlhfImgError(
            f"aesthetic: no file {missing}. Make weights and card with: rlhf-img reward train aesthetic --pairs DATA "
            f"--out {path}"
        )
    known = json.loads(card.read_text())
    if path.is_dir():
        from rlhf_img.rewards.vlm_reward import load_vlm

        return load_vlm(path), known["centre"], known["scale"]
    return load_head(path), known["centre"], known["scale"]
