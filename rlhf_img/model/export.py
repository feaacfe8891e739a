"""LoRA roles to and from files that the stock `Krea2Pipeline.load_lora_weights` reads, right at scale 1.0."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import torch
from diffusers import Krea2Pipeline
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.loading import SETTINGS_FILE, Model
from rlhf_img.model.lora import adopt, keep_state, role_parameters, roles

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that stock pipelines look for in a folder."""


def save_lora(model: Model, role: str, folder: str | Path) -> Path:
    """Write `role` to `folder` with its rank and alpha, all at once or not at all; returns the file.

    Raises RlhfImgError for an unknown role or a folder that cannot be written.
    """
    role_parameters(model.transformer, role)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as scratch:
            Krea2Pipeline.save_lora_weights(
                scratch,
                transformer_lora_layers=get_peft_model_state_dict(model.transformer, adapter_name=role),
                transformer_lora_adapter_metadata=model.transformer.peft_config[role].to_dict(),
            )
            os.replace(Path(scratch) / LORA_FILE, folder / LORA_FILE)
    except OSError as error:
        raise RlhfImgError(f'could not write the LoRA to "{folder}": {error}; give a writable folder') from error
    return folder / LORA_FILE


def save_merged(
    model: Model, role: str, folder: str | Path, *, is_distilled: bool, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `model` to the new `folder` as a stock pipeline with the adapter `role` added to its weights.

    `dtype` is that of the transformer on the disk; `is_distilled` makes the stock pipeline sample at the levels of a
    distilled checkpoint. Uses `model` up: its transformer is the merged one afterwards, without any role.
    Raises RlhfImgError for an unknown role, or a folder that is there or cannot be written.
    """
    role_parameters(model.transformer, role)
    folder = Path(folder)
    if folder.exists():
        raise RlhfImgError(f'"{folder}" is there already; give a new folder for the merged model')
    model.transformer.fuse_lora(adapter_names=[role])
    model.transformer.unload_lora()
    model.transformer.to(dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as scratch:
            dataclasses.replace(model, is_distilled=is_distilled).pipeline().save_pretrained(scratch)
            (Path(scratch) / SETTINGS_FILE).write_text(json.dumps({"default_size": model.default_size}))
            os.chmod(scratch, 0o755)  # a temporary folder is its owner's alone
            os.rename(scratch, folder)
            Path(scratch).mkdir()  # for the context to remove
    except OSError as error:
        raise RlhfImgError(f'could not write the model to "{folder}": {error}; give a writable folder') from error
    return folder


def has_alpha(folder: str | Path) -> bool:
    """Whether the LoRA in `folder` says how it is scaled: in its metadata, or layer by layer."""
    with safe_open(Path(folder) / LORA_FILE, framework="pt") as file:
        keys, metadata = file.keys(), file.metadata() or {}
        return "lora_alpha" in metadata.get("lora_adapter_metadata", "") or any(k.endswith(".alpha") for k in keys)


def load_lora(model: Model, folder: str | Path, role: str) -> None:
    """Add the LoRA in `folder` as the trainable role `role`, without making it the active one.

    Raises RlhfImgError for a name in use and for a folder without a readable LoRA for this model.
    """
    file = Path(folder) / LORA_FILE
    if not file.is_file():
        raise RlhfImgError(f'there is no {LORA_FILE} in "{folder}"; give a folder that `save_lora` wrote')
    if not role.isidentifier() or role in roles(model.transformer):
        raise RlhfImgError(f'a role needs a new name of letters, digits and underscores; got "{role}"')
    try:
        weights, metadata = Krea2Pipeline.lora_state_dict(
            str(folder), weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True
        )
        with keep_state(model.transformer):
            model.transformer.load_lora_adapter(weights, adapter_name=role, metadata=metadata)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise RlhfImgError(f'"{file}" is not a LoRA for this model: {error}') from error
    adopt(model.transformer, role)
