"""ImageReward: a BLIP that reads the prompt with the image before it, and a head that learnt people's rankings."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.protocol import Images

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the published model's raw scores, which it takes out of them."""

_TOKENS = 35
"""Length to which prompts are padded or cut."""

_HEAD_WIDTHS = (1024, 128, 64, 16, 1)
_DROPOUTS = (0.2, 0.2, 0.1)
"""After the first layers; they do nothing when scoring, but have numbers among the layers."""

_BITS_PER_HEAD = 64
"""Width of an attention head of every ViT that BLIP uses."""

_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)
"""From timm's names of a ViT, as in the published file, to those of transformers."""


class ImageRewardModel(nn.Module):
    """BLIP's image tower and text encoder with cross-attention, of transformers, and the linear layers of the head."""

    def __init__(self, vision: Any, text: Any) -> None:
        """vision, text: their configs."""
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *_HEAD_WIDTHS)
        layers: list[nn.Module] = []
        for number, (inner, outer) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(inner, outer))
            layers += [nn.Dropout(_DROPOUTS[number])] if number < len(_DROPOUTS) else []
        self.head = nn.Sequential(*layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Raw scores (B,): what the first text token knows once it has seen the image."""
        seen = self.vision(pixel_values=pixel_values).last_hidden_state
        everywhere = torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen,
                         encoder_attention_mask=everywhere).last_hidden_state
        scores: Tensor = self.head(read[:, 0].float())
        return scores[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """The model with its preprocessing."""

    model: ImageRewardModel
    tokenizer: Any
    image_processor: Any

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], images: Images, *, batch: int = 32) -> Tensor:
        """Scores (B,) in the published units: those of the training prompts had mean 0 and deviation 1."""
        device = next(self.model.parameters()).device
        found = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            read = self.tokenizer(
                list(prompts[part]), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
            )
            pixels = self.image_processor(images=list(images[part]), return_tensors="pt")["pixel_values"]
            found.append(self.model(read["input_ids"].to(device), read["attention_mask"].to(device),
                                    pixels.to(device)).cpu())
        return (torch.cat(found) - MEAN) / STD


def imagereward(
    prompts: Sequence[str],
    images: Images,
    *,
    model: str = "THUDM/ImageReward",
    tokenizer: str = "google-bert/bert-base-uncased",
    **columns: object,
) -> list[float]:
    """What people rank higher of a prompt's images (ImageReward), about normal; cut to [-3, 3].

    Xu et al. 2023, arXiv:2304.05977. model: option; a hub id or folder with med_config.json and ImageReward.pt or
    ImageReward.safetensors. tokenizer: option; BERT's.
    """
    return open_image_reward(model, tokenizer)(prompts, images).clamp(-3, 3).tolist()


imagereward.range = (-3.0, 3.0)  # type: ignore[attr-defined]
imagereward.floor = 0.05  # type: ignore[attr-defined]
imagereward.needs = "THUDM/ImageReward, 1.8 GB, and BERT's tokenizer"  # type: ignore[attr-defined]


@lru_cache(maxsize=2)
def open_image_reward(model: str, tokenizer: str) -> Scorer:
    """Raises RlhfImgError if files are missing or do not fit together."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    try:
        settings = json.loads(_file(model, "med_config.json").read_text())
        weights = _weights(model)
        words = AutoTokenizer.from_pretrained(tokenizer)
        loaded, side = from_state(weights, settings)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RlhfImgError(
            f"ImageReward cannot be opened from {model} (tokenizer {tokenizer}): {error}. Give a folder or hub id that "
            "holds med_config.json and ImageReward.pt or ImageReward.safetensors as the option `model`"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # CLIP's preprocessing at BLIP's size: short side, bicubic, centre.
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return Scorer(model=loaded.eval().requires_grad_(False).to(device), tokenizer=words, image_processor=images)


def from_state(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[ImageRewardModel, int]:
    """The model of a published state, and the side of its images in pixels.

    weights: names `blip.visual_encoder.*`, `blip.text_encoder.*` and `mlp.layers.*`; others are BLIP's own heads, which
    score nothing. settings: of med_config.json. Raises RuntimeError or KeyError if they do not fit.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    state = {}
    for name, value in weights.items():
        if name.startswith("blip.visual_encoder."):
            state[f"vision.{_renamed(name.removeprefix('blip.visual_encoder.'))}"] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            state[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
        elif name.startswith("mlp.layers."):
            state[f"head.{name.removeprefix('mlp.layers.')}"] = value
    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    places = state["vision.embeddings.position_embedding"].shape[1] - 1
    side = patch * round(places**0.5)
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({n.split(".")[3] for n in state if n.startswith("vision.encoder.layers.")}),
        num_attention_heads=width // _BITS_PER_HEAD, image_size=side, patch_size=patch, layer_norm_eps=1e-6,
    )  # fmt: skip
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
            "hidden_act", "layer_norm_eps")
    text = BlipTextConfig(
        **{key: settings[key] for key in keys}, encoder_hidden_size=width, is_decoder=True,
        vocab_size=state["text.embeddings.word_embeddings.weight"].shape[0], pad_token_id=0,
    )  # fmt: skip
    model = ImageRewardModel(vision, text)
    model.load_state_dict(state)
    return model, side


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _file(model: str, name: str) -> Path:
    if Path(model).is_dir():
        return Path(model) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, name))


def _weights(model: str) -> Mapping[str, Tensor]:
    if (Path(model) / "ImageReward.safetensors").is_file():
        return load_file(Path(model) / "ImageReward.safetensors")
    # The published file is torch's own format; only tensors are read from it, no code.
    state: Mapping[str, Tensor] = torch.load(_file(model, "ImageReward.pt"), map_location="cpu", weights_only=True)
    return state
