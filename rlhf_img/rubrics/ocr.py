"""Reading words with rapidocr: one strip where writing was found, or whatever is written anywhere in an image."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rlhf_img.errors import RlhfImgError

_LINE_HEIGHT = 48
"""Pixels to which a line is scaled: what the recognition model was trained at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Words on one line, the reader's confidence in [0, 1], and where: left, top, right, bottom as fractions."""

    text: str
    confidence: float
    box: tuple[float, float, float, float]


@cache
def _engine() -> Any:
    """Created once, when first needed."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise RlhfImgError("checking text needs rapidocr: pip install rapidocr onnxruntime") from error
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            # lines are padded to at least this width, and most here are one short word: half the time of the usual 320
            "Rec.rec_img_shape": [3, _LINE_HEIGHT, 128],
            # one thread: rewards run beside the training
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def read_lines(image: npt.NDArray[np.uint8]) -> tuple[Line, ...]:
    """Every line of text in an image, from top to bottom.

    Args:
        image: uint8 (H, W, 3), RGB.
    """
    height, width = image.shape[:2]
    result = _engine()(image[..., ::-1], use_det=True, use_cls=False, use_rec=True)  # rapidocr wants BGR
    if not result.txts:
        return ()
    return tuple(
        Line(
            text=str(text),
            confidence=float(score),
            box=(
                float(corners[:, 0].min() / width), float(corners[:, 1].min() / height),
                float(corners[:, 0].max() / width), float(corners[:, 1].max() / height),
            ),
        )
        for text, score, corners in zip(result.txts, result.scores, result.boxes, strict=True)
    )  # fmt: skip


def read(image: npt.NDArray[np.uint8], box: tuple[float, float, float, float]) -> tuple[str, float]:
    """The line of text in `box` (left, top, right, bottom as fractions), and the confidence in [0, 1].

    Args:
        image: uint8 (H, W, 3), RGB.
    """
    height, width = image.shape[:2]
    pad = 0.2 * (box[3] - box[1]) * height
    left, right = max(0, round(box[0] * width - pad)), min(width, round(box[2] * width + pad))
    top, bottom = max(0, round(box[1] * height - pad)), min(height, round(box[3] * height + pad))
    line = Image.fromarray(image[top:bottom, left:right])
    size = (max(8, round(line.width * _LINE_HEIGHT / line.height)), _LINE_HEIGHT)
    pixels = np.asarray(line.resize(size, Image.Resampling.BICUBIC))[..., ::-1]  # rapidocr wants BGR
    result = _engine()(pixels, use_det=False, use_cls=False, use_rec=True)
    if not result.txts:
        return "", 0.0
    return str(result.txts[0]), float(result.scores[0])
