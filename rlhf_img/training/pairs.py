"""Preference pairs as files: reading them from the common layouts, checking every pair, writing TRL's columns.

A data set is a Parquet file or a folder of them. Two layouts are read:

    prompt, chosen, rejected [, source, on_policy, margin]          TRL's preference columns; what is written here
    prompt, image_0, image_1, label | prefers_0                     two images and a label, as in most public sets

`label` is the number of the preferred image, 0 or 1; `prefers_0` is 1 where the first is preferred, 0 where the second
is, and anything between is a tie (Pick-a-Pic's `label_0`). Other names of columns are mapped:
"prompt=caption,image_0=jpg_0".
An image is encoded bytes, a struct of bytes and path (`datasets`), or a path beside the data set.
"""

import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rlhf_img.errors import RlhfImgError, did_you_mean

TRL = ("prompt", "chosen", "rejected")
LABELLED = ("prompt", "image_0", "image_1")
LABELS = ("label", "prefers_0")
EXTRA = ("source", "on_policy", "margin")
_KNOWN = (*TRL, *LABELLED[1:], *LABELS, *EXTRA)
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_SCHEMA = pa.schema({
    "prompt": pa.string(), "chosen": _IMAGE, "rejected": _IMAGE, "source": pa.string(), "on_policy": pa.bool_(),
    "margin": pa.float64(),
})  # fmt: skip
_FEATURES = {
    **{name: {"_type": "Image"} for name in ("chosen", "rejected")},
    **{name: {"dtype": kind, "_type": "Value"}
       for name, kind in (("prompt", "string"), ("source", "string"), ("on_policy", "bool"), ("margin", "float64"))},
}
"""What `datasets` reads from a Parquet file's metadata: that the structs are images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two images of one prompt, of one size, of which one is preferred."""

    prompt: str
    chosen: bytes
    """An encoded image, such as PNG."""
    rejected: bytes
    source: str | None = None
    """What made the pair: settings, rewards, people."""
    on_policy: bool | None = None
    """Whether one of the images at least was drawn by the model that is to be trained, as it is; None: not known."""
    margin: float | None = None
    """How much better the chosen one is, in the units of `source`; None: not known."""

    def images(self) -> tuple[Image.Image, Image.Image]:
        """The chosen and the rejected image, RGB."""
        return _open(self.chosen), _open(self.rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    """A row that is no preference pair, and why."""

    row: str
    """File and row, counted from 0."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What a data set holds."""

    pairs: int
    prompts: int
    bad: dict[str, int]
    """Reason -> rows that are left out for it."""
    examples: dict[str, str]
    """Reason -> the first such row."""
    on_policy: float | None
    """Share of the pairs with an on-policy image, of those of which it is known."""
    sources: dict[str, int]
    sizes: dict[str, int]
    """ "64 x 64" -> pairs."""
    margins: dict[str, float]
    """Quantiles of the margins that are known."""

    @property
    def bad_share(self) -> float:
        return sum(self.bad.values()) / max(1, self.pairs + sum(self.bad.values()))

    def lines(self) -> list[str]:
        """For people."""
        known = "not known" if self.on_policy is None else f"{self.on_policy:.0%}"
        lines = [f"{self.pairs} pairs of {self.prompts} prompts, {known} with an on-policy image",
                 "sizes: " + ", ".join(f"{size} ({n})" for size, n in self.sizes.items()),
                 "sources: " + ", ".join(f"{source} ({n})" for source, n in self.sources.items())]
        if self.margins:
            lines.append("margin: " + ", ".join(f"{name} {value:.3g}" for name, value in self.margins.items()))
        lines += [f"left out: {n} x {reason} (first: {self.examples[reason]})" for reason, n in self.bad.items()]
        return lines


def parse_columns(text: str | None) -> dict[str, str]:
    """ "prompt=caption,image_0=jpg_0" as a mapping from our names to the file's.

    Raises RlhfImgError for a name that means nothing here.
    """
    columns = {}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        ours, equals, theirs = item.partition("=")
        if not equals or not theirs:
            raise RlhfImgError(f'"{item}" maps no column: give ours=theirs, such as image_0=jpg_0')
        if ours not in _KNOWN:
            raise RlhfImgError(f'there is no column "{ours}"; {did_you_mean(ours, _KNOWN)}')
        columns[ours] = theirs
    return columns


def read_rows(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Pair | Bad]:
    """Every row of a data set as a checked pair, or as what is wrong with it. A pair that comes again is bad too.

    Raises RlhfImgError if there is no such data set, or it has none of the layouts.
    """
    seen: set[bytes] = set()
    for file in _files(path):
        table = _opened(file)
        names = _names(file, table.schema_arrow.names, columns or {})
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=sorted(set(names.values()))):
            for raw in batch.to_pylist():
                found = _pair({ours: raw[theirs] for ours, theirs in names.items()}, file.parent)
                if isinstance(found, Pair):
                    digest = hashlib.sha256(b"\0".join((found.prompt.encode(), found.chosen, found.rejected))).digest()
                    found = "a pair that was there before" if digest in seen else found
                    seen.add(digest)
                yield found if isinstance(found, Pair) else Bad(row=f"{file.name}, row {number}", reason=found)
                number += 1


def read_pairs(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Pair]:
    """The good pairs of a data set."""
    return (row for row in read_rows(path, columns) if isinstance(row, Pair))


def survey(path: Path, columns: Mapping[str, str] | None = None, *, max_bad: float = 1.0) -> Survey:
    """Reads a whole data set and says what is in it.

    Raises RlhfImgError if more than the share `max_bad` of its rows cannot be used, or none can.
    """
    bad, examples, sources, sizes = Counter[str](), dict[str, str](), Counter[str](), Counter[str]()
    prompts, margins, policies = set[str](), list[float](), list[bool]()
    for row in read_rows(path, columns):
        if isinstance(row, Bad):
            bad[row.reason] += 1
            examples.setdefault(row.reason, row.row)
            continue
        width, height = Image.open(io.BytesIO(row.chosen)).size
        sizes[f"{width} x {height}"] += 1
        sources[row.source or "not known"] += 1
        prompts.add(row.prompt)
        margins += [] if row.margin is None else [row.margin]
        policies += [] if row.on_policy is None else [row.on_policy]
    levels = (("lowest", 0.0), ("quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75), ("highest", 1.0))
    found = Survey(
        pairs=sum(sizes.values()), prompts=len(prompts), bad=dict(bad.most_common()), examples=examples,
        on_policy=sum(policies) / len(policies) if policies else None, sources=dict(sources.most_common()),
        sizes=dict(sizes.most_common()),
        margins={name: float(np.quantile(margins, q)) for name, q in levels} if margins else {},
    )  # fmt: skip
    if not found.pairs or found.bad_share > max_bad:
        reasons = "; ".join(f"{n} x {reason} (first: {examples[reason]})" for reason, n in bad.most_common(4))
        raise RlhfImgError(
            f"{path}: {sum(bad.values())} of {found.pairs + sum(bad.values())} rows cannot be used, "
            f"and at most {max_bad:.0%} may be bad: {reasons or 'it is empty'}. Mend the data, or allow more"
        )
    return found


def write_pairs(file: Path, pairs: Sequence[Pair]) -> None:
    """One Parquet file in TRL's columns, whole or not at all; `datasets` reads its structs as images."""
    rows = [asdict(pair) for pair in pairs]
    for row in rows:
        row.update({name: {"bytes": row[name], "path": None} for name in ("chosen", "rejected")})
    metadata = {"huggingface": json.dumps({"info": {"features": {name: _FEATURES[name] for name in _SCHEMA.names}}})}
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(metadata))
    hidden = file.with_name(f".partial-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, hidden)
        os.replace(hidden, file)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        raise RlhfImgError(f"{file} cannot be written: {error.strerror or error}; give another --out") from error


def encode_image(image: Image.Image) -> bytes:
    """PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RlhfImgError(f"there are no pairs in {path}; give a .parquet file or a folder that holds some, "
                           "such as `rlhf-img pairs make --out FOLDER` writes")
    return files


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise RlhfImgError(f"{file} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _names(file: Path, present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Ours -> the file's name of each column that is to be read."""
    if missing := [theirs for theirs in columns.values() if theirs not in present]:
        raise RlhfImgError(f'{file} has no column "{missing[0]}"; {did_you_mean(missing[0], present)}')
    names = {ours: columns.get(ours, ours) for ours in _KNOWN if columns.get(ours, ours) in present}
    trl = all(name in names for name in TRL)
    labelled = all(name in names for name in LABELLED) and any(name in names for name in LABELS)
    if not trl and not labelled:
        raise RlhfImgError(
            f"{file} has the columns {', '.join(present)}: expected {', '.join(TRL)}, or {', '.join(LABELLED)} and "
            f"{' or '.join(LABELS)}. Say what is what with --columns, such as prompt=caption,image_0=jpg_0"
        )
    return names


def _pair(row: dict[str, Any], folder: Path) -> Pair | str:
    """The pair of a row, or what is wrong with it."""
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        return "empty prompt"
    cells = (row["chosen"], row["rejected"]) if "chosen" in row and "rejected" in row else _by_label(row)
    if isinstance(cells, str):
        return cells
    chosen, rejected = (_image_bytes(cell, folder) for cell in cells)
    if chosen is None or rejected is None:
        return "image missing"
    try:
        one, other = (np.asarray(_open(data)) for data in (chosen, rejected))
    except (OSError, ValueError, Image.DecompressionBombError):
        return "image unreadable"
    if one.shape != other.shape:
        return "images of different size"
    if np.array_equal(one, other):
        return "identical images"
    margin = row.get("margin")
    return Pair(
        prompt=row["prompt"].strip(), chosen=chosen, rejected=rejected, source=row.get("source"),
        on_policy=row.get("on_policy"), margin=None if margin is None else float(margin),
    )  # fmt: skip


def _by_label(row: dict[str, Any]) -> tuple[Any, Any] | str:
    """The preferred and the other image of a labelled row."""
    value = 1 - row["label"] if row.get("label") in (0, 1) else row.get("prefers_0")
    if isinstance(value, bool | int | float) and not math.isnan(value):
        first, second = row["image_0"], row["image_1"]
        return {1.0: (first, second), 0.0: (second, first)}.get(float(value), "a tie")
    return "label absent"


def _image_bytes(cell: Any, folder: Path) -> bytes | None:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        # Only beside the data set: a file from elsewhere must not make us read other files.
        target = (folder / cell).resolve()
        return target.read_bytes() if target.is_relative_to(folder.resolve()) and target.is_file() else None
    return cell if isinstance(cell, bytes) and cell else None


def _open(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")
