"""Heat maps over images, for people."""

import numpy as np
import numpy.typing as npt
from PIL import Image

_RED = np.array([255.0, 30.0, 0.0])
_STRENGTH = 0.7
"""Opacity where a defect is certain: what is below must stay visible."""


def overlay(image: npt.NDArray[np.uint8], heat_hw: np.ndarray) -> npt.NDArray[np.uint8]:
    """An image uint8 (H, W, 3), reddened by a heat map (h, w) in [0, 1] whose cells tile it."""
    height, width = image.shape[:2]
    heat = Image.fromarray(heat_hw.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    alpha = _STRENGTH * np.asarray(heat)[..., None].clip(0, 1)
    return np.round(image + alpha * (_RED - image)).astype(np.uint8)
