"""Weight files before they are loaded: whether they are there and whole, and what dtype their weights will have."""

import json
from pathlib import Path

import torch
from torch import nn

from rlhf_img.errors import RlhfImgError

PARTS = ("transformer", "text_encoder", "vae")
"""The folders of a pipeline that hold weights."""
_LARGEST_HEADER = 100 * 2**20
"""Bytes; safetensors itself reads no larger one."""


def check_folder(folder: Path) -> None:
    """Raises RlhfImgError if a part of the pipeline in `folder`, or a file of its weights, is missing or cut short."""
    for part in PARTS:
        room = folder / part
        if not room.is_dir():
            raise RlhfImgError(f'the folder "{folder}" has no {part}; copy or save the whole pipeline again')
        indices = sorted(room.glob("*.safetensors.index.json"))
        named = {name for index in indices for name in _weight_map(index).values()}
        files = [room / name for name in sorted(named)] or sorted(room.glob("*.safetensors"))
        if not files:
            raise RlhfImgError(f'the folder "{room}" has no .safetensors file; copy or save the pipeline again')
        for file in files:
            check_file(file)


def check_file(file: Path) -> None:
    """Raises RlhfImgError if a safetensors file is missing, or its size is not what its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if 0 < length <= min(size, _LARGEST_HEADER) else None
    except OSError as error:
        raise RlhfImgError(f"{file} cannot be read: {error.strerror}; copy or download it again") from error
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise RlhfImgError(f"{file} is no safetensors file, or its head is damaged; copy or download it again")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise RlhfImgError(
            f"{file} is {'cut short' if size < wanted else 'damaged'}: it has {size:,} bytes and should have "
            f"{wanted:,}; copy or download it again"
        )


def weight_dtype(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that diffusers gives the weight `name` of `module`: `dtype`, but float32 for a Krea 2's norms."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RlhfImgError(f"{index} does not say where the weights are: {error}; copy it again") from error
    return dict(found)
