"""Images that somebody has labelled: a CSV of what is broken in each and where, as targets for the detector.

    image,class,x,y,width,height
    a.png,hole,12,30,8,8          a box
    a.png,torn edge,40,17         a point
    b.png,clean                   nothing is broken
    c.png,broken                  something is, nobody says what or where
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.rewards.artifact_losses import Targets, class_balance
from rlhf_img.rewards.defects import APPEARANCES, CLASSES
from rlhf_img.rewards.folder_images import Skip, decode, digest

CLEAN, BROKEN = "clean", "broken"
"""Instead of a class: nothing is broken; something is, of which the kind is not known."""

COLUMNS = ("image", "class", "x", "y", "width", "height")

_POINT = 1 / 16
"""Radius of the square around a point, as a share of the image's side: people click beside what they mean."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the image's width and height."""


class Mark(NamedTuple):
    """One thing that is broken. kind: a class, or `BROKEN`. box: None where nobody says where it is."""

    kind: str
    box: Box | None


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled images uint8 (N, H, W, 3), in an order by their content; without marks an image is clean.

    Every fourth is held out. What nobody has marked in a labelled image is whole.
    """

    names: tuple[str, ...]
    pixels_NHW3: np.ndarray
    marks: tuple[tuple[Mark, ...], ...]
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def heldout(self) -> range:
        """Places of the images that are only measured on."""
        return range(0, len(self.names), 4)

    @cached_property
    def train(self) -> np.ndarray:
        """Places of the images that are learnt from."""
        return np.setdiff1d(np.arange(len(self.names)), self.heldout)

    @cached_property
    def weights_N(self) -> Tensor:
        """Of each image in the loss, so that rare classes count; mean 1 over those learnt from."""
        kinds = [sorted({mark.kind for mark in marks}) or [CLEAN] for marks in self.marks]
        learnt = [kinds[i] for i in self.train]
        weights = torch.ones(len(kinds))
        weights[self.train] = torch.tensor(class_balance(Counter(k for ks in learnt for k in ks), learnt))
        return weights

    @property
    def counts(self) -> dict[str, int]:
        """Images of each class, clean ones included."""
        return dict(Counter(kind for marks in self.marks for kind in {mark.kind for mark in marks} or {CLEAN}))

    def images(self, places: Sequence[int] | np.ndarray, mirrored_B: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1]; `mirrored_B`: bool, which of them left to right."""
        x = torch.from_numpy(self.pixels_NHW3[list(places)]).permute(0, 3, 1, 2).float() / 255
        return x if mirrored_B is None else torch.where(mirrored_B[:, None, None, None], x.flip(-1), x)

    def targets(
        self, places: Sequence[int] | np.ndarray, size: tuple[int, int], mirrored_B: Tensor | None = None
    ) -> Targets:
        """Of those images, in heat maps of `size` cells. Inside a box of no class, no single class is known."""
        chosen = [self.marks[i] for i in places]
        class_BK = torch.zeros(len(chosen), len(self.classes))
        cells_BKhw = torch.zeros(len(chosen), len(self.classes), *size)
        broken_Bhw = torch.zeros(len(chosen), *size, dtype=torch.bool)
        class_BK[:, len(CLASSES) :] = cells_BKhw[:, len(CLASSES) :] = torch.nan  # nobody is asked for looks
        for b, marks in enumerate(chosen):
            for mark in sorted(marks, key=lambda mark: mark.kind != BROKEN):  # a class is surer than "something"
                inside = (slice(None), slice(None)) if mark.box is None else _inside(mark.box, size)
                if mark.kind == BROKEN:
                    class_BK[b] = torch.nan
                    cells_BKhw[b, :, *inside] = torch.nan
                    broken_Bhw[b, *inside] |= mark.box is not None
                else:
                    k = self.classes.index(mark.kind)
                    class_BK[b, k] = 1.0
                    cells_BKhw[b, k, *inside] = torch.nan if mark.box is None else 1.0
        if mirrored_B is not None:
            cells_BKhw = torch.where(mirrored_B[:, None, None, None], cells_BKhw.flip(-1), cells_BKhw)
            broken_Bhw = torch.where(mirrored_B[:, None, None], broken_Bhw.flip(-1), broken_Bhw)
        damaged_B = torch.tensor([any(mark.kind not in APPEARANCES for mark in marks) for marks in chosen])
        return Targets(damaged_B=damaged_B, class_BK=class_BK, cells_BKhw=cells_BKhw, broken_Bhw=broken_Bhw)


def read_labels(file: Path, side: int, classes: Sequence[str] = CLASSES) -> Labelled:
    """The labelled images of a CSV, as squares of `side` px; paths of images are relative to the file.

    A row gives an image, a class (one of `classes`, "clean" or "broken"), and perhaps a point or a box in the image's
    own pixels; an image may have several. Raises RlhfImgError, with the line, for whatever cannot be used.
    """
    marks: dict[str, list[Mark]] = {}
    clean: set[str] = set()
    lines: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for number, row in _rows(file):
        where, name = f"{file}, line {number}", row["image"]
        if name not in sizes:
            sizes[name], lines[name], marks[name] = _size(file.parent / name, where), number, []
        kind = _kind(row["class"], classes, where)
        box = _box(row, sizes[name], where)
        if kind == CLEAN:
            clean.add(name)
        else:
            marks[name].append(Mark(kind, box))
        if name in clean and (marks[name] or box):
            raise RlhfImgError(f"{where}: {name} is {CLEAN} and something of it is marked; leave out one of the rows")
    if len(marks) < 4:
        raise RlhfImgError(f"{file} labels {len(marks)} images; give at least 4, of which one is held out")
    pixels = [_pixels(file.parent / name, side, f"{file}, line {line}") for name, line in lines.items()]
    return _in_order(list(marks), pixels, [tuple(found) for found in marks.values()], tuple(classes))


def join(parts: Sequence[Labelled]) -> Labelled:
    """All images of several files, of one side and with the same classes."""
    return _in_order([name for part in parts for name in part.names],
                     [pixels for part in parts for pixels in part.pixels_NHW3],
                     [marks for part in parts for marks in part.marks], parts[0].classes)


def _in_order(
    names: Sequence[str], pixels: Sequence[np.ndarray], marks: Sequence[tuple[Mark, ...]], classes: tuple[str, ...]
) -> Labelled:
    digests = [digest(image.tobytes()) for image in pixels]
    order = sorted(range(len(names)), key=lambda i: (digests[i], str(marks[i])))
    content = "\n".join(f"{digests[i]} {marks[i]}" for i in order)
    return Labelled(names=tuple(names[i] for i in order), pixels_NHW3=np.stack([pixels[i] for i in order]),
                    marks=tuple(marks[i] for i in order), classes=classes, fingerprint=digest(content.encode()))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows, with every column there, stripped."""
    if not file.is_file():
        raise RlhfImgError(f"no file {file}; give a CSV with the columns {','.join(COLUMNS)}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="", strict=True)
            columns = reader.fieldnames or ()
            if strange := [column for column in columns if column not in COLUMNS]:
                near = did_you_mean(strange[0], COLUMNS)
                raise RlhfImgError(f'{file}, line 1: no column is called "{strange[0]}"; {near}')
            if not {"image", "class"} <= set(columns):
                raise RlhfImgError(f"{file}, line 1: columns are {','.join(COLUMNS)}, of which image and class must be "
                                   f"there; given {','.join(columns) or 'nothing'}")
            for row in reader:
                if "" in row:
                    raise RlhfImgError(f"{file}, line {reader.line_num}: more fields than columns; a name that has a "
                                       f"comma stands in quotes")
                yield reader.line_num, {c: (row.get(c) or "").strip() for c in COLUMNS}
    except (UnicodeDecodeError, csv.Error) as error:
        raise RlhfImgError(f"{file} is no CSV in UTF-8: {error}") from error


def _kind(text: str, classes: Sequence[str], where: str) -> str:
    known = (*classes, CLEAN, BROKEN)
    if (kind := text.lower().replace("_", " ")) not in known:
        looks = "; looks are no defects unless --appearance is given" if kind in APPEARANCES else ""
        raise RlhfImgError(f'{where}: no class is called "{text}"; {did_you_mean(kind, known)}{looks}')
    return kind


def _box(row: dict[str, str], size: tuple[int, int], where: str) -> Box | None:
    """The box of a row, or the square around its point; None if it gives neither."""
    given = [column for column in COLUMNS[2:] if row[column]]
    if not given:
        return None
    if given not in (["x", "y"], list(COLUMNS[2:])):
        raise RlhfImgError(f"{where}: a point has x and y, a box has x, y, width and height; given {', '.join(given)}")
    try:
        x, y, *extent = (float(row[column]) for column in given)
    except ValueError:
        raise RlhfImgError(f"{where}: {', '.join(given)} are numbers of pixels; given "
                           f"{', '.join(row[column] for column in given)}") from None
    w, h = size
    right, bottom = (x + extent[0], y + extent[1]) if extent else (x, y)
    if not (0 <= x <= right <= w and 0 <= y <= bottom <= h):
        raise RlhfImgError(f"{where}: it reaches from ({x:g}, {y:g}) to ({right:g}, {bottom:g}), but {row['image']} "
                           f"has {w} x {h} px")
    m = 0.0 if extent else _POINT
    return max(0.0, x / w - m), max(0.0, y / h - m), min(1.0, right / w + m), min(1.0, bottom / h + m)


def _inside(box: Box, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the cells that a box touches, at least one of each."""
    left, top, right, bottom = box
    spans = []
    for low, high, cells in ((top, bottom, size[0]), (left, right, size[1])):
        first = min(int(low * cells), cells - 1)
        spans.append(slice(first, max(first + 1, int(np.ceil(high * cells - 1e-6)))))
    return spans[0], spans[1]


def _size(path: Path, where: str) -> tuple[int, int]:
    """Width and height as people see the image. Raises RlhfImgError if there is none."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except OSError as error:
        raise RlhfImgError(f"{where}: {path} cannot be read as an image: {error}") from error


def _pixels(path: Path, side: int, where: str) -> np.ndarray:
    try:
        picture, _ = decode(path, side)
    except Skip as reason:
        raise RlhfImgError(f"{where}: {path} cannot be used: {reason}") from None
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS))
