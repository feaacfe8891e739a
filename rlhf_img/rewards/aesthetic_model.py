"""The head of the aesthetic reward: one number for an image, from a frozen backbone's features."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.artifact_model import DefectNet, load_detector
from rlhf_img.rewards.backbones import Backbone, open_backbone
from rlhf_img.rewards.preference import card_of

SMALL = "artifact"
"""The backbone that ships with the package: the features of the artifact reward's network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """A frozen image tower as one vector an image: mean, deviation and largest value of each channel over its places.

    name: "artifact", or a hub id or folder of `open_backbone`.
    """

    name: str
    tower: DefectNet | Backbone
    side: int = 0
    """Side in pixels at which "artifact" looks; a backbone resizes by itself and has none here."""

    @torch.no_grad()
    def __call__(self, images_B3HW: Float[Tensor, "B 3 H W"], *, batch: int = 64) -> Float[Tensor, "B F"]:
        """Images in [0, 1], of any size: the whole image is brought to the tower's, nothing is cropped."""
        return torch.cat([self._pooled(part) for part in images_B3HW.split(batch)])

    def _pooled(self, x_B3HW: Tensor) -> Tensor:
        if isinstance(self.tower, Backbone):
            places = self.tower.features(x_B3HW)
        else:
            size = (self.side, self.side)
            if x_B3HW.shape[2:] != size:
                x_B3HW = F.interpolate(x_B3HW, size=size, mode="bilinear", antialias=True, align_corners=False)
            places = self.tower.embed(x_B3HW.clamp(0, 1))
        flat = places.float().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2), flat.amax(2)], dim=1).cpu()


def open_features(name: str) -> Features:
    """Raises RlhfImgError if there is no such backbone."""
    if name == SMALL:
        detector = load_detector()
        return Features(name=name, tower=detector.net.requires_grad_(False), side=detector.side)
    return Features(name=name, tower=open_backbone(name))


class AestheticHead(nn.Module):
    """A vector of features to a score, higher is better. Features are standardised as the training set's were."""

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(width))
        self.register_buffer("std_F", torch.ones(width))
        self.layers = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, features_BF: Float[Tensor, "B F"]) -> Float[Tensor, " B"]:
        scores: Tensor = self.layers((features_BF - self.mean_F) / self.std_F)
        return scores[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class AestheticModel:
    """A trained head on its backbone. The prompt is not looked at."""

    features: Features
    head: AestheticHead

    @torch.inference_mode()
    def __call__(self, prompts: list[str], images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        scores: Tensor = self.head(self.features(images_B3HW))
        return scores


def load_head(weights: Path) -> AestheticModel:
    """Raises RlhfImgError if weights or card are missing or do not fit."""
    card: dict[str, Any] = json.loads(card_of(weights).read_text())
    features = open_features(card["backbone"])
    tensors = load_file(weights)
    if (width := features(torch.zeros(1, 3, 64, 64)).shape[1]) != len(tensors["mean_F"]):
        raise RlhfImgError(
            f"aesthetic: {weights} were made for {len(tensors['mean_F'])} features, {features.name} now gives {width}: "
            "train them again with rlhf-img reward train aesthetic"
        )
    head = AestheticHead(len(tensors["mean_F"]), len(tensors["layers.1.bias"]))
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise RlhfImgError(f"aesthetic: {weights} holds no such head: {error}") from error
    return AestheticModel(features=features, head=head.eval())
