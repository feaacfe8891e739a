"""Several processes as one run: who does what, and what they tell each other. One process alone needs nothing of it.

Processes are started by `rlhf-img`, torchrun or accelerate, which set the same environment variables. Each samples,
scores and trains its share of an iteration's prompts or pairs, groups kept whole; values and gradients are then made
common. The first process alone writes files, but for the parts of sharded weights (`training.tensors`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.loading import Model
from rlhf_img.model.policy import Policy
from rlhf_img.model.sharding import shard_policies
from rlhf_img.training.rundir import RunDir

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others; a judge may be slow, and a dead process is found out sooner."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted",
         "remote process exited", "Timed out waiting", "Socket closed")  # fmt: skip
"""What gloo and NCCL say where a process is gone."""


@contextmanager
def joined() -> Iterator[None]:
    """Together with the other processes of the run, if it was started as several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        if not any(words in str(error) for words in _LOST):
            raise
        raise RlhfImgError(
            "another process of this run has ended, and this one cannot go on alone: its own message says why (killed "
            "without one: out of memory?). What the last checkpoint holds is safe; go on with --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def world() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def require_one(what: str) -> None:
    """Raises RlhfImgError in a run of several processes."""
    if world() > 1:
        raise RlhfImgError(f"{what} runs in one process so far: start it without torchrun or accelerate")


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def check_shares(name: str, count: int, processes: int) -> None:
    """Raises RlhfImgError if the setting `name`, which is `count`, cannot be dealt out in equal shares."""
    if count % processes:
        raise RlhfImgError(
            f"{name} must be a multiple of the number of processes, {processes}, so that their shares are equal; got "
            f"{count}"
        )


def share(count: int) -> list[int]:
    """Which of `count` things are this process's; where there are fewer than processes, some have one twice."""
    return [i % count for i in range(rank(), max(count, world()), world())] if count else []


def gather(value: T) -> list[T]:
    """The value of every process, by rank."""
    if world() == 1:
        return [value]
    found: list[T] = [value] * world()
    dist.all_gather_object(found, value)
    return found


def gather_shares(value: Tensor, count: int | None = None) -> Tensor:
    """The rows of all processes in the order in which `share` dealt them out; of fewer than processes, `count`."""
    parts = gather(value)
    return torch.stack([parts[i % len(parts)][i // len(parts)] for i in range(count or sum(map(len, parts)))])


def joint_metrics(
    metrics: Mapping[str, float], how: Mapping[str, Callable[[list[float]], float]]
) -> dict[str, float]:
    """Each metric over the processes that have it: its mean, unless `how` says sum or max."""
    every = gather(dict(metrics))
    found = {name: [one[name] for one in every if name in one] for name in {n: None for one in every for n in one}}
    return {name: how.get(name, mean)(values) for name, values in found.items()}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The gradient of the mean loss over all processes, whose shares are of one size; FSDP has averaged its own."""
    found = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if world() > 1 and found:
        flat = torch.cat([g.flatten() for g in found])
        dist.all_reduce(flat)
        for gradient, part in zip(found, flat.div_(world()).split([g.numel() for g in found]), strict=True):
            gradient.copy_(part.view_as(gradient))


def shard(model: Model, policies: Sequence[Policy], *, wanted: bool) -> list[Policy]:
    """The policies with their transformers shared out over all processes, if that is wanted and there are several.

    The model was loaded into memory for it (see `training.loop.open_model`) and is on the device afterwards.
    """
    if not wanted or world() == 1:
        return list(policies)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world(),))
    sharded = shard_policies(policies, mesh)
    for module in (model.text_encoder, model.vae):
        module.to(device)
    return sharded


def open_run(path: Path, *, resume: bool) -> RunDir:
    """The run directory: opened by the first process, see `RunDir.create`, and then followed by the others."""
    run = RunDir.create(path, resume=resume) if is_first() else RunDir.follow(path)
    gather(None)  # the others wait here
    return run
