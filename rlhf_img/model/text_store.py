"""Fused text on disk: prompts are read once, before training, and come from there afterwards."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.loading import Model
from rlhf_img.model.official import write_safetensors

_NAME = "text"
_SAMPLED = 64
"""Values of each weight that tell one set of weights from another."""


class TextStore:
    """A file a prompt, of its fused features (L, D), in a folder for the weights and the dtype that made them.

    Runs may share it, also while they run: a file is written whole or not at all. A damaged one is as good as none.
    """

    def __init__(self, folder: str | Path, model: Model) -> None:
        """Raises RlhfImgError if the folder cannot be made."""
        self._folder = Path(folder) / _fingerprint(model)
        self._device = model.device
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RlhfImgError(
                f'compute.text_store: "{folder}" cannot be used ({error.strerror}); give a writable folder'
            ) from error

    def __contains__(self, prompt: str) -> bool:
        return self._file(prompt).is_file()

    def read(self, prompt: str) -> Tensor | None:
        """Features of a prompt on the model's device; None if they are not there or cannot be read."""
        try:
            return load_file(self._file(prompt), device=str(self._device))[_NAME]
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, prompt: str, features: Tensor) -> None:
        """Raises RlhfImgError if it cannot be written."""
        write_safetensors({_NAME: features.cpu()}, self._file(prompt))

    def _file(self, prompt: str) -> Path:
        return self._folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def _fingerprint(model: Model) -> str:
    """Of what turns a prompt into features: the tapped layers, dtypes, and some values of each weight."""
    digest = hashlib.sha256(repr(model.text_layers).encode())
    parts: tuple[nn.Module, ...] = (model.text_encoder, model.transformer.text_fusion, model.transformer.txt_in)
    for part in parts:
        for name, weight in part.named_parameters():
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
