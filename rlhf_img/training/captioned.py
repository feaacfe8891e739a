"""Images with captions: from a folder, or rendered by the playground."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.playground import variants

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
"""Files that say which caption belongs to which image, in the order in which they are looked for."""
_COLUMNS = {"file": ("file", "file_name"), "prompt": ("prompt", "text", "caption")}
"""Ours -> what a table may call it; the second is that of Hugging Face's image folders."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """A caption, and how to get its image: RGB in [0, 1], (3, side, side) for the side asked for."""

    prompt: str
    pixels: Callable[[int], Tensor]


def from_variant(name: str, count: int) -> list[Captioned]:
    """`count` rendered examples of a variant of the playground. Raises RlhfImgError for an unknown one."""
    if name not in variants.VARIANTS:
        raise RlhfImgError(f'the playground has no variant "{name}"; {did_you_mean(name, variants.VARIANTS)}')
    examples = (variants.example(name, seed) for seed in range(count))
    return [Captioned(prompt, _rendered(image)) for prompt, image in examples]


def from_folder(folder: Path) -> list[Captioned]:
    """The images of a folder with their captions.

    Captions are in captions.jsonl or captions.csv (columns file and prompt; also metadata.jsonl with file_name and
    text), or each in a .txt file with its image's name. Every image must have one and be readable.
    Raises RlhfImgError otherwise.
    """
    if not folder.is_dir():
        raise RlhfImgError(f"there is no folder {folder}; give one that holds images and their captions")
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    found = _from_table(table) if table else _from_texts(folder)
    if not found:
        raise RlhfImgError(f"{folder} holds no image with a caption: expected one of {', '.join(_TABLES)}, or for "
                           "each picture.png a picture.txt")
    return [Captioned(prompt, _read_check(file)) for file, prompt in found]


def _from_texts(folder: Path) -> list[tuple[Path, str]]:
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in _PICTURES)
    if bare := [file.name for file in pictures if not file.with_suffix(".txt").is_file()]:
        raise RlhfImgError(f"{folder}: {len(bare)} of {len(pictures)} images have no caption, such as {bare[0]}: write "
                           f"it to {Path(bare[0]).with_suffix('.txt')}, or take the image out")
    return [(file, _told(file.with_suffix(".txt").read_text(encoding="utf-8"), file.name)) for file in pictures]


def _from_table(table: Path) -> list[tuple[Path, str]]:
    rows: list[tuple[str, object]] = []
    with open(table, encoding="utf-8", newline="") as file:
        if table.suffix == ".csv":
            rows = [(f"{table}, row {i}", row) for i, row in enumerate(csv.DictReader(file), start=1)]
        else:
            rows = [(f"{table}, line {i}", _parsed(table, i, text)) for i, text in enumerate(file, 1) if text.strip()]
    return [(_beside(table, where, _cell(where, row, "file")), _told(_cell(where, row, "prompt"), where))
            for where, row in rows]


def _parsed(table: Path, number: int, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RlhfImgError(f"{table}, line {number}: not JSON ({error.msg}); give one object a line") from error


def _cell(where: str, row: object, column: str) -> str:
    names = _COLUMNS[column]
    value = next((row[name] for name in names if name in row), None) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise RlhfImgError(f'{where}: expected "{names[0]}" with text; got {row!r}')
    return value


def _beside(table: Path, where: str, name: str) -> Path:
    target = (table.parent / name).resolve()
    # Only beside the table: a data set from elsewhere must not make us read other files.
    if not target.is_relative_to(table.parent.resolve()) or not target.is_file():
        raise RlhfImgError(f'{where}: there is no image "{name}" in {table.parent}')
    return target


def _told(text: str, where: str) -> str:
    if not text.strip():
        raise RlhfImgError(f"{where}: the caption is empty; write one, or take the image out")
    return " ".join(text.split())


def _read_check(file: Path) -> Callable[[int], Tensor]:
    """The image's pixels, read when they are asked for; that it is one is checked now."""
    try:
        with Image.open(file) as image:
            image.load()
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise RlhfImgError(f"{file} is no readable image: {error}; mend it, or take it out") from error

    def pixels(side: int) -> Tensor:
        with Image.open(file) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        return _tensor(np.asarray(square))

    return pixels


def _rendered(image: np.ndarray) -> Callable[[int], Tensor]:
    def pixels(side: int) -> Tensor:
        if side != image.shape[0]:
            raise RlhfImgError(f"the playground draws {image.shape[0]} px, and this model wants {side}: give --data")
        return _tensor(image)

    return pixels


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def captions(items: Sequence[Captioned]) -> list[str]:
    """Every caption once."""
    return list(dict.fromkeys(item.prompt for item in items))
