"""A run's state as files: what a checkpoint holds, and how it comes back to the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import load_canaries, save_canaries
from rlhf_img.model.policy import Policy
from rlhf_img.training.pool.run import PromptPool

_CANARIES = "canaries.safetensors"
Trained = Mapping[str, tuple[Policy, torch.optim.Optimizer]]
"""What is trained, by name, each with its optimiser."""


def save_state(folder: Path, trained: Trained, step: int, pool: PromptPool | None = None) -> None:
    """Weights, their average, the optimiser's moments and the step, as safetensors and JSON.

    Of the judges, what their canaries compare with, and what the prompt pool knows. Nothing else has to be kept: the
    order of prompts and the noise depend on the seed, the step and the pool alone.
    """
    for role, (policy, optimizer) in trained.items():
        tensors = {f"weights/{name}": p.detach() for name, p in policy.parameters.items()}
        tensors |= {f"average/{name}": a for name, a in policy.average.items()}
        for name, parameter in policy.parameters.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / f"{role}.safetensors")
    save_canaries(folder / _CANARIES)
    if pool is not None:
        pool.save(folder)
    (folder / "state.json").write_text(json.dumps({"step": step}))


def load_state(folder: Path, trained: Trained, pool: PromptPool | None = None) -> int:
    """Restores what `save_state` wrote and returns the step.

    Raises RlhfImgError if the checkpoint is of another model, adapter or optimiser, or of other prompts.
    """
    try:
        tensors = {role: load_file(folder / f"{role}.safetensors") for role in trained}
        step = json.loads((folder / "state.json").read_text())["step"]
    except (OSError, ValueError, KeyError) as error:
        raise RlhfImgError(
            f"the checkpoint {folder} cannot be read ({error}); delete it to resume from an earlier one"
        ) from error
    for role, (policy, optimizer) in trained.items():
        _load_role(folder, tensors[role], policy, optimizer)
    load_canaries(folder / _CANARIES)
    if pool is not None:
        pool.load(folder)
    return int(step)


def _load_role(folder: Path, tensors: dict[str, Tensor], policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in policy.parameters.items():
        saved = tensors.get(f"weights/{name}")
        if saved is None or saved.shape != parameter.shape:
            raise RlhfImgError(f"the checkpoint {folder} is of another model: {name} is missing or has another shape")
        parameter.data.copy_(saved)
        policy.average[name].copy_(tensors[f"average/{name}"])
        prefix, suffix = "optimizer/", f"/{name}"
        optimizer.state[parameter] = {
            key[len(prefix) : -len(suffix)]: value if value.ndim == 0 else value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }
