"""A contact sheet of features: the images on which each is most active; one standalone HTML file."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from rlhf_img.errors import RlhfImgError
from rlhf_img.report.images import data_uri
from rlhf_img.report.page import environment

_SIDE = 96
"""Side in pixels from which images are shrunk: a sheet has hundreds."""


class FeatureView(NamedTuple):
    """A feature as the sheet shows it."""

    id: int
    name: str | None
    mark: str | None
    proposed: str | None
    facts: str
    images: tuple[npt.NDArray[np.uint8], ...]


def build_sheet(features: Sequence[FeatureView], title: str, facts: Sequence[str], out: Path) -> Path:
    """Writes the sheet and returns its path. Raises RlhfImgError if it cannot be written."""
    rows = [(feature, [_uri(image) for image in feature.images]) for feature in features]
    html = environment().get_template("features.html.j2").render(title=title, facts=facts, rows=rows)
    hidden = out.with_name(f".partial-{out.name}")
    try:
        hidden.write_text(html, encoding="utf-8")
        hidden.replace(out)
    except OSError as error:
        raise RlhfImgError(f"{out} cannot be written: {error.strerror}: give another --out") from error
    return out


def _uri(image: npt.NDArray[np.uint8]) -> str | None:
    picture = Image.fromarray(image)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer)
