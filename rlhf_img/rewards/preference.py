"""What rewards that learn from preference pairs have in common: which pairs they learn from, and how good they are."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.calibration import calibration_error

Part = Literal["train", "val", "heldout"]
CARD = "aesthetic.json"
"""Of a reward that is a folder; that of a file has the file's name."""


@runtime_checkable
class Preference(Protocol):
    """Two images of a prompt, of which one is preferred."""

    @property
    def prompt(self) -> str: ...
    @property
    def chosen(self) -> bytes:
        """An encoded image."""
    @property
    def rejected(self) -> bytes: ...
    def images(self) -> tuple[Image.Image, Image.Image]:
        """The chosen and the rejected one, RGB."""


Read = Callable[[], Iterable[Preference]]
"""Reads a data set from its beginning; it need not fit into memory."""


def part_of(prompt: str) -> Part:
    """Eight tenths of the prompts are learnt from, one calibrates, one is held out. By content: no prompt is in two."""
    tenth = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "heldout" if tenth == 0 else "val" if tenth == 1 else "train"


def fingerprint(read: Read) -> tuple[str, dict[str, int]]:
    """Of all pairs, and how many each part has. Raises RlhfImgError if a part has none."""
    digest, sizes = hashlib.sha256(), dict.fromkeys(("train", "val", "heldout"), 0)
    for pair in read():
        for field in (pair.prompt.encode(), pair.chosen, pair.rejected):
            digest.update(hashlib.sha256(field).digest())
        sizes[part_of(pair.prompt)] += 1
    if not all(sizes.values()):
        raise RlhfImgError(
            f"{sum(sizes.values())} pairs are too few: they divide by prompt into {sizes['train']} to learn from, "
            f"{sizes['val']} to calibrate on and {sizes['heldout']} held out, and each needs one; give pairs of more "
            "prompts"
        )
    return digest.hexdigest()[:16], sizes


def bradley_terry(margin_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """-log P(chosen preferred) = -log sigmoid(s_chosen - s_rejected); log 2 where the two score alike.

    Bradley and Terry 1952; margin_B is s_chosen - s_rejected.
    """
    return -F.logsigmoid(margin_B)


def fitted_scale(margin_B: Float[Tensor, " B"]) -> float:
    """The factor on scores for which pairs that were not trained on have the likeliest outcome; at least 1e-3.

    A head that has learnt its pairs by heart is too sure of others; where the order is never wrong, it is at most 1.
    """
    margin_B = margin_B.double()
    low, high = math.log(1e-3), math.log(1.0 if bool((margin_B >= 0).all()) else 1e3)
    for _ in range(60):  # the loss is convex in the factor, so that its slope tells the side
        middle = (low + high) / 2
        slope = -(margin_B * torch.sigmoid(-math.exp(middle) * margin_B)).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp((low + high) / 2)


def measured(margin_B: Float[Tensor, " B"]) -> dict[str, Any]:
    """What margins of held-out pairs say: accuracy (ties count half) with its 95 % interval (Wilson), loss (log 2 is
    chance), and the calibration error of the probabilities."""
    right = float((margin_B > 0).double().sum() + 0.5 * (margin_B == 0).double().sum())
    interval = binomtest(round(right), len(margin_B)).proportion_ci(method="wilson")
    p = torch.sigmoid(margin_B.double())
    happened = torch.arange(2 * len(p)) < len(p)
    return {
        "pairs": len(margin_B), "accuracy": right / len(margin_B), "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high), "loss": float(bradley_terry(margin_B.double()).mean()),
        "calibration_error": calibration_error(torch.cat([p, 1 - p]), happened),
    }  # fmt: skip


def card_of(weights: Path) -> Path:
    """Where the card of a reward is: beside a file, inside a folder."""
    return weights / CARD if weights.is_dir() else weights.with_suffix(".json")


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of an unfinished training, with its settings in it.

    Raises RlhfImgError if what is there was made with others, or if it cannot be written.
    """
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [f"{key} was {before.get(key)}, is {value}" for key, value in settings.items()
                   if before.get(key) != value]  # fmt: skip
        if changed:
            raise RlhfImgError(f"{folder} is of another training: {'; '.join(changed)}. Give the same settings and "
                               "pairs, or another --out")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise RlhfImgError(f"{folder} cannot be written: {error.strerror}; give another --out") from error


def write_card(weights: Path, card: dict[str, Any]) -> None:
    """Whole or not at all; last, since without its card a reward is not read."""
    hidden = card_of(weights).with_suffix(".part")
    hidden.write_text(json.dumps(card, indent=2) + "\n")
    os.replace(hidden, card_of(weights))
