"""A page that shows preference pairs side by side; one standalone HTML file."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_img.errors import RlhfImgError
from rlhf_img.report.images import data_uri
from rlhf_img.report.page import environment


class PairView(NamedTuple):
    """A pair as the page shows it."""

    prompt: str
    chosen: bytes
    """An encoded image."""
    rejected: bytes
    source: str | None
    on_policy: bool | None
    margin: float | None


def build_pairs(pairs: Sequence[PairView], title: str, facts: Sequence[str], out: Path) -> Path:
    """Writes the page and returns its path. Raises RlhfImgError if it cannot be written."""
    rows = [(pair, data_uri(io.BytesIO(pair.chosen)), data_uri(io.BytesIO(pair.rejected))) for pair in pairs]
    html = environment().get_template("pairs.html.j2").render(title=title, facts=facts, rows=rows)
    hidden = out.with_name(f".partial-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_text(html, encoding="utf-8")
        hidden.replace(out)
    except OSError as error:
        raise RlhfImgError(f"{out} cannot be written: {error.strerror}: give another file to --out") from error
    return out
