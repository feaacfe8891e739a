"""Frozen image backbones of transformers (SigLIP, SigLIP 2, DINOv2, DINOv3) as maps of patch embeddings."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_img.errors import RlhfImgError

_MODELS = {
    "siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel", "siglip2_vision_model": "Siglip2VisionModel",
    "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "dinov3_vit": "DINOv3ViTModel",
}  # fmt: skip
"""Model type -> the class of transformers with its image tower alone."""

_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters, as preprocessor files hold them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A frozen image tower. It is no torch module, so that its weights stay out of what is trained and saved.

    name: hub id or folder. grid: patches along each side. patch: their side in pixels. flat: SigLIP 2 with free shapes
    ("naflex"), which takes flattened patches. mean, std, resample: of its preprocessor file.
    """

    name: str
    model: Any
    grid: int
    patch: int
    flat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str

    @property
    def width(self) -> int:
        """Channels of a level of features."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def features(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Embeddings of the patches at half of the depth and at the end, C = 2 width, on the images' device.

        Half-way, embeddings still know what a patch looks like; at the end, what it is part of.
        """
        inputs = {name: value.to(self.model.device) for name, value in self.preprocess(images_B3HW).items()}
        out = self.model(**inputs, output_hidden_states=True)
        levels = (out.hidden_states[len(out.hidden_states) // 2], out.last_hidden_state)
        # Class and register tokens come first.
        patches_BNC = torch.cat([F.layer_norm(x[:, -self.grid**2 :].float(), (self.width,)) for x in levels], dim=-1)
        return patches_BNC.transpose(1, 2).unflatten(2, (self.grid, self.grid)).to(images_B3HW.device)

    def preprocess(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """What the model takes: the whole image at the model's size, nothing cropped, with its mean and deviation.

        Pillow's filters as torch has them, one direction after the other with 8 bits in between, as Pillow does. Not by
        an image processor: that of DINOv3 is only there with torchvision.
        """
        side = self.grid * self.patch
        smooth = {} if self.resample == "nearest-exact" else {"antialias": True, "align_corners": False}
        x = images_B3HW.float()
        for size in ((x.shape[2], side), (side, side)):
            x = F.interpolate(x, size=size, mode=self.resample, **smooth).clamp(0, 1).mul(255).round().div(255)
        x = (x - x.new_tensor(self.mean)[:, None, None]) / x.new_tensor(self.std)[:, None, None]
        if not self.flat:
            return {"pixel_values": x}
        p, batch, patches = self.patch, len(x), self.grid**2
        tiles = x.unfold(2, p, p).unfold(3, p, p)  # (B, 3, h, w, p, p)
        shapes = torch.tensor([[self.grid, self.grid]]).expand(batch, 2)
        return {"pixel_values": tiles.permute(0, 2, 3, 4, 5, 1).reshape(batch, patches, p * p * 3),
                "pixel_attention_mask": torch.ones(batch, patches, dtype=torch.int32), "spatial_shapes": shapes}


def open_backbone(name: str) -> Backbone:
    """The image tower of a hub id or folder, on a GPU if there is one. Raises RlhfImgError for any other model."""
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise RlhfImgError(
            f"backbone {name} cannot be opened: {error}. Give a folder with config.json and preprocessor_config.json, "
            f"or a hub id such as google/siglip2-base-patch16-256 or facebook/dinov2-small"
        ) from error
    if config.model_type not in _MODELS:
        raise RlhfImgError(f"backbone {name} is a {config.model_type}; known are {', '.join(_MODELS)}")
    model = getattr(transformers, _MODELS[config.model_type]).from_pretrained(name)
    model = model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    flat, patch = config.model_type.startswith("siglip2"), int(model.config.patch_size)
    grid = math.isqrt(settings.get("max_num_patches", 256)) if flat else _side(settings) // patch
    return Backbone(
        name=name, model=model, grid=grid, patch=patch, flat=flat, mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]), resample=_RESAMPLE.get(int(settings.get("resample", 3)), "bicubic"),
    )  # fmt: skip


def _side(settings: dict[str, Any]) -> int:
    """The side in pixels that a preprocessor file ends at."""
    size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    if isinstance(size, int):
        return size
    return int(size.get("height") or size["shortest_edge"])
