"""Tensors as files of a run: whole ones in one file, written by the first process, sharded ones in one a process.

torch.distributed.checkpoint writes and reads the parts, and deals them out anew to another number of processes. Its
safetensors form is used: its own holds pickles.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.training import distributed

_LIST = "parts.json"
"""Beside the parts: their names, so that one that is lost is missed."""


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes `name`.safetensors, or the folder `name` of parts if a tensor is sharded, into `folder`.

    Every process calls this with its parts, and the first has made `folder`. Raises OSError where writing fails, and
    RlhfImgError if the processes do not write into one folder.
    """
    if not any(isinstance(value, DTensor) for value in tensors.values()):
        if distributed.is_first():
            save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, _file(folder, name))
        return
    distributed.gather(None)  # the first has made the folder
    if not all(distributed.gather(folder.is_dir())):
        raise RlhfImgError(
            f"not every process sees {folder}, which the first has made, and sharded weights are written by all: give "
            "--out a folder of a file system that all machines share"
        )
    place = folder / name
    with _plain_errors():
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
    own = [path.name for path in place.glob(f"shard-{distributed.rank() + 1:05d}-*")]
    names = [name for part in distributed.gather(own) for name in part]
    if distributed.is_first():
        (place / _LIST).write_text(json.dumps(names))


def tensor_shapes(folder: Path, name: str) -> dict[str, torch.Size]:
    """The shapes of the whole tensors that `write_tensors` wrote.

    Raises OSError or ValueError if they cannot be read, or if parts are missing.
    """
    with _plain_errors():
        if not (folder / name).is_dir():
            with safe_open(_file(folder, name), framework="pt") as file:
                return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        names = json.loads((folder / name / _LIST).read_text())
        if lost := [part for part in names if not (folder / name / part).is_file()]:
            raise ValueError(f"parts are missing in {folder / name}: {', '.join(lost)}")
        found = HuggingFaceStorageReader(str(folder / name)).read_metadata().state_dict_metadata
        return {key: value.size for key, value in found.items() if isinstance(value, TensorStorageMetadata)}


@torch.no_grad()
def read_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors, whole or sharded, with what `write_tensors` wrote, be it whole or of any number of processes.

    Raises OSError or ValueError if it cannot be read, KeyError if a tensor is not there.
    """
    with _plain_errors():
        if (folder / name).is_dir():
            alone = not dist.is_initialized()
            reader = HuggingFaceStorageReader(str(folder / name))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(dict(tensors), storage_reader=reader, no_dist=alone)
            return
        with safe_open(_file(folder, name), framework="pt") as file:
            for key, value in tensors.items():
                saved = file.get_tensor(key).to(value.device)
                if isinstance(value, DTensor):
                    saved = distribute_tensor(saved, value.device_mesh, value.placements, src_data_rank=None)
                value.copy_(saved)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the libraries raise as errors of Python's own."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except CheckpointException as error:  # of all processes that failed, and not an Exception
        causes = [f"process {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        raise OSError("; ".join(causes)) from error
