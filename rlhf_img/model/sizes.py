"""How large a model is, from its configs alone: built on the meta device, where weights have sizes and no values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
from torch import nn
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLModel

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.files import weight_dtype
from rlhf_img.model.loading import default_size, local_folder, without_progress_bars

KREA_2 = "krea-2"
"""Stands for the published sizes, where no file of them is at hand."""
_QWEN3_VL_4B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What a run's memory and time depend on."""

    name: str
    transformer: Mapping[str, Any]
    """diffusers' config of it, and of the others."""
    vae: Mapping[str, Any]
    text_encoder: Qwen3VLConfig
    patch_size: int
    default_size: int
    """Side of an image in pixels."""

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of tokens of a square image. Raises RlhfImgError where they are not whole."""
        side = 2 ** len(self.vae.get("temperal_downsample", (False, True, True))) * self.patch_size
        if size < side or size % side:
            raise RlhfImgError(f"the size must be a positive multiple of {side} pixels; got {size}")
        return size // side, size // side

    def parts(self) -> dict[str, nn.Module]:
        """Transformer, text encoder and autoencoder on the meta device."""
        with torch.device("meta"):
            return {
                "transformer": Krea2Transformer2DModel.from_config(dict(self.transformer)),
                "text_encoder": Qwen3VLModel(self.text_encoder),
                "vae": AutoencoderKLQwenImage.from_config(dict(self.vae)),
            }


def sizes_of(name: str) -> Sizes:
    """Of a model as `load` takes it, or of "krea-2". Raises RlhfImgError if its configs cannot be read."""
    if name == KREA_2:
        with torch.device("meta"):
            return Sizes(
                name=name, transformer=Krea2Transformer2DModel(num_layers=1).config | {"num_layers": 28},
                vae=AutoencoderKLQwenImage().config, text_encoder=Qwen3VLConfig(**_QWEN3_VL_4B), patch_size=2,
                default_size=1024,
            )  # fmt: skip
    _, at, parts = name.partition(".safetensors@")
    folder = local_folder(parts if at else name)
    where = str(folder or parts or name)
    try:
        with without_progress_bars():
            index = Krea2Pipeline.load_config(where)
            return Sizes(
                name=name, transformer=Krea2Transformer2DModel.load_config(where, subfolder="transformer"),
                vae=AutoencoderKLQwenImage.load_config(where, subfolder="vae"),
                text_encoder=AutoConfig.from_pretrained(where, subfolder="text_encoder"),
                patch_size=int(index.get("patch_size", 2)), default_size=default_size(folder),
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise RlhfImgError(
            f'the configs of "{name}" cannot be read: {str(error).splitlines()[0]}; "{KREA_2}" stands for the '
            "published sizes and needs no file"
        ) from error


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a part's weights as `load` loads them."""
    return sum(p.numel() * weight_dtype(module, name, dtype).itemsize for name, p in module.named_parameters())
