"""Reads a folder of pictures, whatever lies in it: each file becomes RGB, or is skipped and counted with a reason."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rlhf_img.errors import RlhfImgError

_FEWEST = 5
"""Pictures that there must be: three or four to learn from and one or two to measure on."""
_DETAIL = 256
"""Pictures are kept with a short side of at most this many px, or 1.5 times the training side: crops need no more."""
_MEMORY = 2 * 2**30
"""Bytes of pictures kept; the rest of a larger folder is left out, evenly over its sub-folders."""
_FLAT = 3.0
"""Standard deviation of grey values (0 to 255) below which a picture shows nothing that could be broken."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What was read. names: of the files used, relative to the folder, beside their `pictures`, RGB.

    read_as: files by the conversion they needed. skipped: files by why they are not used. fingerprint: of names and
    pixels as kept, by which a changed folder is found out.
    """

    names: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    read_as: dict[str, list[str]]
    skipped: dict[str, list[str]]
    fingerprint: str


class Skip(Exception):
    """Why a file is not used."""


def read_folder(folder: Path, side: int, *, seed: int = 0, memory: int = _MEMORY) -> Folder:
    """All pictures under a folder with at least `side` px on their short side, in an order drawn by `seed`.

    Greyscale, CMYK and 16-bit pictures become 8-bit RGB, transparency becomes white, of an animation the first frame
    counts. Links to folders are not followed. `memory`: bytes of pictures to keep at most. Raises RlhfImgError if the
    folder does not exist or fewer than 5 pictures can be used.
    """
    if not folder.is_dir():
        raise RlhfImgError(f"{folder} is no folder. Give the folder that holds your pictures with --images")
    found = Folder(names=(), pictures=(), read_as={}, skipped={}, fingerprint="")
    pictures: dict[str, Image.Image] = {}
    digests: dict[str, str] = {}
    kept = 0
    names = sorted(_files(folder, found.skipped), key=lambda name: digest(f"{seed} {name}".encode()))
    for name in names:
        try:
            if kept >= memory:
                raise Skip(f"no room: {memory / 2**30:g} GiB of pictures were read before it")
            picture, converted = _read(folder / name, side)
            own = digest(picture.tobytes())
            if own in digests:
                raise Skip("a copy of another file")
        except Skip as reason:
            found.skipped.setdefault(str(reason), []).append(name)
            continue
        for kind in converted:
            found.read_as.setdefault(kind, []).append(name)
        pictures[name], digests[own] = picture, name
        kept += 3 * picture.width * picture.height
    if len(pictures) < _FEWEST:
        raise RlhfImgError(
            f"{folder} has {len(pictures)} pictures that can be used, at least {_FEWEST} are needed, and hundreds are "
            f"better. Skipped: {summary(found.skipped) or 'nothing, there are no other files'}"
        )
    fingerprint = digest("\n".join(f"{own} {name}" for own, name in digests.items()).encode())
    return Folder(names=tuple(pictures), pictures=tuple(pictures.values()), read_as=found.read_as,
                  skipped=found.skipped, fingerprint=fingerprint)


def summary(files: dict[str, list[str]]) -> str:
    """Each reason with its count and up to three files.

    >>> summary({"broken": ["b.png"], "smaller than 64 px": ["a.png", "c.png"]})
    '2 smaller than 64 px (a.png, c.png); 1 broken (b.png)'
    """
    most_first = sorted(files.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{len(names)} {reason} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
                     for reason, names in most_first)


def _files(folder: Path, skipped: dict[str, list[str]]) -> Iterator[str]:
    """Names of all files, relative to the folder; what cannot be looked into goes to `skipped`."""
    def unreadable(error: OSError) -> None:
        skipped.setdefault("folder that cannot be opened", []).append(os.path.relpath(error.filename, folder))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                skipped.setdefault("link to a folder", []).append(os.path.relpath(os.path.join(root, name), folder))
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in files)


def decode(path: Path, side: int) -> tuple[Image.Image, list[str]]:
    """A file's picture in RGB, upright, and the conversions it needed; a large JPEG comes at a fraction of its size.

    Raises Skip if it cannot be read or has less than `side` px on its short side.
    """
    if not path.is_file():  # a pipe would be waited on for ever
        raise Skip("no regular file, or a dead link")
    kept = _kept(side)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no reason to stop
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if min(file.size) < side:
                    raise Skip(f"smaller than {side} px")
                # JPEG files are decoded at a fraction of their size at once, where that is enough.
                file.draft(None, (kept, kept))
                converted = _conversions(file)
                picture = _rgb(ImageOps.exif_transpose(file))
    except Skip:
        raise
    except UnidentifiedImageError:
        raise Skip("no image that Pillow reads") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Skip(f"more than {(Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels") from None
    except PermissionError:
        raise Skip("may not be read") from None
    except Exception:  # decoders raise whatever they stumble over: OSError, SyntaxError, ValueError, struct.error, ...
        raise Skip("broken or cut off") from None
    return picture, converted


def _read(path: Path, side: int) -> tuple[Image.Image, list[str]]:
    """The picture as kept, and the conversions it needed. Raises Skip."""
    picture, converted = decode(path, side)
    if np.asarray(picture.convert("L")).std() < _FLAT:
        raise Skip("of one colour")
    shrink = _kept(side) / min(picture.size)
    if shrink < 1:
        width, height = (max(side, round(length * shrink)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture, converted


def _kept(side: int) -> int:
    """Short side in pixels at which pictures are kept, for training at `side`."""
    return max(_DETAIL, 3 * side // 2)


def _conversions(file: Image.Image) -> list[str]:
    kinds = []
    if getattr(file, "n_frames", 1) > 1:
        kinds.append("first frame of several")
    if file.mode.startswith("I;16"):
        kinds.append("16 bits to 8")
    if file.mode in ("1", "L", "LA", "La") or file.mode.startswith("I;16"):
        kinds.append("grey to RGB")
    if file.mode == "CMYK":
        kinds.append("CMYK to RGB")
    if file.has_transparency_data:
        kinds.append("transparency on white")
    return kinds


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Skip("32-bit grey, of which white is not known")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def digest(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
