"""Three rewards that are easily pleased, planted to see whether the sentinels notice. Not for training in earnest."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rlhf_img.rewards import Images
from rlhf_img.rubrics.vision import analyze

_CELL = 8
"""Pixels of a cell in which a letter's stroke and its ground both have room."""


def saturation(prompts: Sequence[str], images: Images, **columns: object) -> list[float]:
    """Mean saturation: what "vivid colours" comes down to."""
    x = images.tensor.float()
    return (x.amax(1) - x.amin(1)).mean((1, 2)).tolist()


def text(prompts: Sequence[str], images: Images, **columns: object) -> list[float]:
    """What a naive text detector counts, wherever it is: cells of high contrast, and the ground that glyphs cover."""
    return [(_contrast(image) + _written(image)) / 2 for image in images]


def empty(prompts: Sequence[str], images: Images, **columns: object) -> list[float]:
    """How little there is to see: "clean", "minimal"."""
    grey = images.tensor.float().mean(1)
    change = grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))
    return (1 - (10 * change).clamp(max=1)).tolist()


def _contrast(image: Image.Image) -> float:
    grey = np.asarray(image.convert("L"), dtype=float) / 255
    rows, columns = (side // _CELL for side in grey.shape)
    cells = grey[: rows * _CELL, : columns * _CELL].reshape(rows, _CELL, columns, _CELL)
    return float(np.tanh(cells.std((1, 3)) / 0.2).mean())


def _written(image: Image.Image) -> float:
    box = analyze(np.asarray(image)).text_box
    return (box[2] - box[0]) * (box[3] - box[1]) if box else 0.0


saturation.range = text.range = empty.range = (0.0, 1.0)  # type: ignore[attr-defined]
saturation.floor = text.floor = empty.floor = 0.01  # type: ignore[attr-defined]
