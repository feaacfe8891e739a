"""LoRA roles and trained weights to and from files, for stock diffusers and for ComfyUI; LoRAs right at scale 1.0."""

import json
import os
import tempfile
from pathlib import Path

import torch
from diffusers import Krea2Pipeline
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.loading import SETTINGS_FILE, Model
from rlhf_img.model.lora import adopt, keep_state, role_parameters, roles
from rlhf_img.model.official import official_module, write_safetensors
from rlhf_img.model.sharding import whole

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that stock pipelines look for in a folder."""
WEIGHTS_FILE = "transformer.safetensors"


def save_lora(model: Model, role: str, folder: str | Path) -> Path:
    """Write `role` to `folder` with its rank and alpha, all at once or not at all; returns the file.

    Raises RlhfImgError for an unknown role or a folder that cannot be written.
    """
    role_parameters(model.transformer, role)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
            Krea2Pipeline.save_lora_weights(
                scratch,
                transformer_lora_layers=get_peft_model_state_dict(model.transformer, adapter_name=role),
                transformer_lora_adapter_metadata=model.transformer.peft_config[role].to_dict(),
            )
            os.replace(Path(scratch) / LORA_FILE, folder / LORA_FILE)
    except OSError as error:
        raise RlhfImgError(f'could not write the LoRA to "{folder}": {error}; give a writable folder') from error
    return folder / LORA_FILE


def save_comfyui_lora(model: Model, role: str, file: str | Path) -> Path:
    """Write `role` to one safetensors file with ComfyUI's names, right at strength 1.0; returns the file.

    ComfyUI looks for `diffusion_model.`, the official name of the layer, and `.lora_A.weight`, `.lora_B.weight` and
    `.alpha`; it divides alpha by the rank and does not read diffusers' metadata. Raises RlhfImgError for an unknown
    role or a file that cannot be written.
    """
    state: dict[str, torch.Tensor] = {}
    for key, value in role_parameters(model.transformer, role).items():
        path, _, part = key.rpartition(".")
        layer = model.transformer.get_submodule(path)
        name = f"diffusion_model.{official_module(path)}"
        state[f"{name}.{part}.weight"] = value.detach().cpu().contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(layer.scaling[role] * layer.r[role]))
    return write_safetensors(state, Path(file))


def save_weights(model: Model, folder: str | Path, *, write: bool = True) -> Path:
    """Write all weights of the transformer, which has no role: what a `full` run leaves; returns the file.

    Where they are sharded all processes call this, and one of them writes.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in model.transformer.state_dict().items():
        complete = whole(value)
        if write:
            state[name] = complete.cpu().contiguous()
    file = Path(folder) / WEIGHTS_FILE
    return write_safetensors(state, file) if write else file


def load_weights(model: Model, folder: str | Path) -> None:
    """Read what `save_weights` wrote into the transformer. Raises RlhfImgError if it is of another model."""
    file = Path(folder) / WEIGHTS_FILE
    try:
        model.transformer.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RlhfImgError(f'"{file}" does not hold the weights of this model: {error}') from error


def save_pipeline(model: Model, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write `model`, which has no role, to the new `folder` as a stock pipeline.

    `dtype` is that of the transformer on the disk, to which `model` is changed. Raises RlhfImgError for a folder that
    is there or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise RlhfImgError(f'"{folder}" is there already; give a new folder for the model')
    model.transformer.to(dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as scratch:
            model.pipeline().save_pretrained(scratch)
            (Path(scratch) / SETTINGS_FILE).write_text(json.dumps({"default_size": model.default_size}))
            os.chmod(scratch, 0o755)  # a temporary folder is its owner's alone
            os.rename(scratch, folder)
            Path(scratch).mkdir()  # for the context to remove
    except OSError as error:
        raise RlhfImgError(f'could not write the model to "{folder}": {error}; give a writable folder') from error
    return folder


def merge(model: Model, role: str) -> None:
    """Add the adapter `role` to the weights of the model's transformer, which then has no role any more."""
    model.transformer.fuse_lora(adapter_names=[role])
    model.transformer.unload_lora()


def has_alpha(path: str | Path) -> bool:
    """Whether a LoRA, a folder or a file, says how it is scaled: in its metadata, or layer by layer."""
    with safe_open(_lora_file(path), framework="pt") as file:
        keys, metadata = file.keys(), file.metadata() or {}
        return "lora_alpha" in metadata.get("lora_adapter_metadata", "") or any(k.endswith(".alpha") for k in keys)


def load_lora(model: Model, path: str | Path, role: str) -> None:
    """Add a LoRA, a safetensors file or the folder of one, as the trainable role `role`, without making it active.

    Raises RlhfImgError for a name in use and for what is no readable LoRA for this model.
    """
    file = _lora_file(path)
    if not file.is_file():
        folder = file.parent
        what = f'"{folder}" holds no {file.name}' if folder.is_dir() else f'there is no folder "{folder}"'
        raise RlhfImgError(f"{what}; give that of a LoRA, such as a run's `lora`")
    if not role.isidentifier() or role in roles(model.transformer):
        raise RlhfImgError(f'a role needs a new name of letters, digits and underscores; got "{role}"')
    try:
        weights, metadata = Krea2Pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, use_safetensors=True, return_lora_metadata=True
        )
        with keep_state(model.transformer):
            model.transformer.load_lora_adapter(weights, adapter_name=role, metadata=metadata)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise RlhfImgError(f'"{file}" is not a LoRA for this model: {error}') from error
    adopt(model.transformer, role)


def _lora_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / LORA_FILE
