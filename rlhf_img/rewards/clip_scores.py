"""CLIPScore and PickScore: how near a CLIP model sees an image and its prompt, as it came or after human choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.protocol import Images

_TOKENS = 77
"""What CLIP's text encoder takes; longer prompts are cut."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A CLIP of transformers with its preprocessing."""

    model: Any
    tokenizer: Any
    image_processor: Any

    @torch.inference_mode()
    def cosines(self, texts: Sequence[str], images: Images, *, batch: int = 64) -> Tensor:
        """Cosine between the embeddings of each text and its image, float32 (B,)."""
        found = []
        for start in range(0, len(texts), batch):
            part = slice(start, start + batch)
            read = self.tokenizer(
                list(texts[part]), padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt"
            )
            pixels = self.image_processor(images=list(images[part]), return_tensors="pt")["pixel_values"]
            out = self.model(**read.to(self.model.device), pixel_values=pixels.to(self.model.device, self.model.dtype))
            found.append((out.text_embeds.float() * out.image_embeds.float()).sum(-1).cpu())
        return torch.cat(found)


@lru_cache(maxsize=2)
def open_clip(model: str, processor: str) -> Clip:
    """From hub ids or folders, on a GPU if there is one. Raises RlhfImgError if there is no such CLIP."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    try:
        loaded = CLIPModel.from_pretrained(model).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(processor)
        images = CLIPImageProcessorPil.from_pretrained(processor)
    except (OSError, ValueError) as error:
        raise RlhfImgError(
            f"the CLIP {model} (processor {processor}) cannot be opened: {error}. Give hub ids or folders as the "
            "options `model` and `processor`"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Clip(model=loaded.to(device), tokenizer=tokenizer, image_processor=images)


def pickscore(
    prompts: Sequence[str],
    images: Images,
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    **columns: object,
) -> list[float]:
    """What people pick of two (PickScore): CLIP's logit, logit_scale x cosine; in [0, 40], below 0 taken as 0.

    Kirstain et al. 2023, arXiv:2305.01569. model, processor: options; hub ids or folders.
    """
    clip = open_clip(model, processor)
    return (clip.model.logit_scale.exp().float().cpu() * clip.cosines(prompts, images)).clamp(0, 40).tolist()


pickscore.range = (0.0, 40.0)  # type: ignore[attr-defined]
pickscore.floor = 0.1  # type: ignore[attr-defined]
pickscore.needs = "yuvalkirstain/PickScore_v1, 3.9 GB"  # type: ignore[attr-defined]


def clipscore(
    prompts: Sequence[str],
    images: Images,
    *,
    model: str = "openai/clip-vit-base-patch32",
    processor: str | None = None,
    prefix: str = "A photo depicts ",
    **columns: object,
) -> list[float]:
    """How near CLIP sees image and prompt (CLIPScore): 2.5 max(cosine, 0), in [0, 2.5].

    Hessel et al. 2021, arXiv:2104.08718, with its prefix. model, processor, prefix: options.
    """
    texts = [f"{prefix}{prompt}" for prompt in prompts]
    return (2.5 * open_clip(model, processor or model).cosines(texts, images)).clamp(0, 2.5).tolist()


clipscore.range = (0.0, 2.5)  # type: ignore[attr-defined]
clipscore.floor = 0.01  # type: ignore[attr-defined]
clipscore.needs = "openai/clip-vit-base-patch32, 0.6 GB"  # type: ignore[attr-defined]
