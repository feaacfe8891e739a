"""A run's state as files: what a checkpoint holds, and how it comes back to the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import load_canaries, save_canaries
from rlhf_img.model.policy import Policy
from rlhf_img.training import distributed
from rlhf_img.training.pool.run import PromptPool
from rlhf_img.training.tensors import read_tensors, tensor_shapes, write_tensors

_CANARIES = "canaries.safetensors"
Trained = Mapping[str, tuple[Policy, torch.optim.Optimizer]]
"""What is trained, by name, each with its optimiser."""


def save_state(folder: Path, trained: Trained, step: int, pool: PromptPool | None = None) -> None:
    """Weights, their average, the optimiser's moments and the step, as safetensors and JSON. Every process calls this.

    Of the judges, what their canaries compare with, and what the prompt pool knows. Nothing else has to be kept: the
    order of prompts and the noise depend on the seed, the step and the pool alone.
    """
    for role, (policy, optimizer) in trained.items():
        tensors: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in policy.parameters.items()}
        tensors |= {f"average/{name}": a for name, a in policy.average.items()}
        for name, parameter in policy.parameters.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        write_tensors(folder, role, tensors)
    if distributed.is_first():
        save_canaries(folder / _CANARIES)
        if pool is not None:
            pool.save(folder)
        (folder / "state.json").write_text(json.dumps({"step": step}))


def load_state(folder: Path, trained: Trained, pool: PromptPool | None = None) -> int:
    """Restores what `save_state` wrote and returns the step.

    Raises RlhfImgError if the checkpoint is of another model, adapter or optimiser, or of other prompts. It may be of
    another number of processes, and sharded or not.
    """
    try:
        step = json.loads((folder / "state.json").read_text())["step"]
        for role, (policy, optimizer) in trained.items():
            _load_role(folder, role, policy, optimizer)
    except (OSError, ValueError, KeyError) as error:
        raise RlhfImgError(
            f"the checkpoint {folder} cannot be read ({error}); delete it to resume from an earlier one"
        ) from error
    load_canaries(folder / _CANARIES)
    if pool is not None:
        pool.load(folder)
    return int(step)


def _load_role(folder: Path, role: str, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    shapes = tensor_shapes(folder, role)
    for name, parameter in policy.parameters.items():
        if shapes.get(f"weights/{name}") != parameter.shape:
            raise RlhfImgError(f"the checkpoint {folder} is of another model: {name} is missing or has another shape")
    wanted = {f"weights/{name}": p.detach() for name, p in policy.parameters.items()}
    wanted |= {f"average/{name}": a for name, a in policy.average.items()}
    for key in shapes:
        what, _, rest = key.partition("/")
        moment, _, name = rest.partition("/")
        if what == "optimizer":
            parameter = policy.parameters[name]
            wanted[key] = torch.zeros_like(parameter.detach()) if shapes[key] else torch.zeros(())
            optimizer.state[parameter][moment] = wanted[key]
    read_tensors(folder, role, wanted)
