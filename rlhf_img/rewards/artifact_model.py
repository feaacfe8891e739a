"""The defect detector: one heat map per structural defect class, of a small network or over a frozen backbone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.backbones import Backbone, open_backbone
from rlhf_img.rewards.defects import APPEARANCES, CLASSES

WEIGHTS = Path(__file__).parent / "weights" / "artifact.safetensors"
"""The shipped weights; `artifact.json` beside them is their card."""

_TOP_CELLS = 3
"""A defect is as certain as its 3 most certain cells: one cell is noise, and small defects fill no more."""

_WIDTH = 96
"""Features of a cell in the small network."""


class DefectNet(nn.Module):
    """Images to defect evidence: one logit a class in each cell.

    Without a backbone: 0.38M parameters, a receptive field of 99 px, cells of 4 x 4 px. With one: a light head over its
    frozen embeddings, a cell a patch.
    """

    def __init__(self, backbone: Backbone | None = None, classes: Sequence[str] = CLASSES) -> None:
        """`classes`: names of the outputs, those of looks (`APPEARANCES`) last."""
        super().__init__()
        self.backbone = backbone
        self.classes = tuple(classes)
        if backbone is None:
            self.features = _small_features()
            self.head: nn.Module = nn.Conv2d(_WIDTH, len(classes), 1)
            last = self.head
        else:
            last = nn.Conv2d(64, len(classes), 1)
            self.head = nn.Sequential(
                nn.Conv2d(2 * backbone.width, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), last
            )
        # Rare at first: a cell holds a defect of one class about once in a hundred.
        nn.init.constant_(last.bias, -4.0)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.ones(len(classes)))
        self.bias = nn.Parameter(torch.zeros(len(classes)))

    @property
    def structural(self) -> slice:
        """Which of the classes are defects and not looks."""
        return slice(sum(name not in APPEARANCES for name in self.classes))

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
        """Defect logits of each class in each cell. Images are RGB in [0, 1]."""
        heat: Tensor = self.head(self.embed(images_B3HW))
        return heat

    def embed(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What the head sees of each cell: the backbone's embeddings, or the small network's features."""
        if self.backbone is not None:
            return self.backbone.features(images_B3HW)
        x = (images_B3HW * 2 - 1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.features(x)
        return features

    def pool(self, heat_BKhw: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K"]:
        """Defect logits of each class for the whole image: its most certain cells, calibrated per class."""
        top = heat_BKhw.flatten(2).topk(_TOP_CELLS, dim=-1).values.mean(dim=-1)
        return top * self.scale + self.bias


def log_p_clean(
    logits_BK: Float[Tensor, "B K"], permitted_BK: Bool[Tensor, "B K"] | None = None
) -> Float[Tensor, " B"]:
    """log P(no defect that is not permitted) = sum_k log(1 - p_k), the classes taken as independent; <= 0."""
    kept = F.softplus(logits_BK)
    return -(kept if permitted_BK is None else kept.masked_fill(permitted_BK, 0.0)).sum(dim=-1)


def log_p_damaged(logits_BK: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """log P(a defect, of whichever class); <= 0."""
    # log(1 - e^x) loses its digits near x = 0 unless written with expm1.
    return torch.log(-torch.expm1(log_p_clean(logits_BK).clamp(max=-1e-6)))


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A trained network and the image side in pixels it was trained at."""

    net: DefectNet
    side: int

    @torch.inference_mode()
    def __call__(
        self, images_B3HW: Float[Tensor, "B 3 H W"], *, batch: int = 256
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K h w"]]:
        """Image logits and heat maps on the CPU. Raises what `parts` raises."""
        heat = torch.cat([self.net(part).float() for part in self.parts(images_B3HW, batch)])
        return self.net.pool(heat).cpu(), heat.cpu()

    def parts(self, images_B3HW: Float[Tensor, "B 3 H W"], batch: int = 256) -> list[Tensor]:
        """Images as the network takes them. Raises RlhfImgError for images of a size that it never saw."""
        height, width = images_B3HW.shape[-2:]
        if max(height, width) > 2 * self.side or min(height, width) < self.side / 2:
            raise RlhfImgError(
                f"artifact: images are {width} x {height} px, but these weights were trained at {self.side} px and "
                f"know nothing of other scales. Make others from your own pictures with: rlhf-img reward train "
                f"artifact --images FOLDER --side {_fitting(height, width)} --out FILE, and give them with "
                f"{{reward: artifact, options: {{weights: FILE}}}}; or leave the reward out."
            )
        device = next(self.net.parameters()).device
        return [part.to(device, torch.float32) for part in images_B3HW.split(batch)]


def _fitting(height: int, width: int) -> int:
    """A side for training that takes in such images: a multiple of 8 from 32 to 1024."""
    return min(1024, max(32, 8 * round(min(height, width) / 8)))


def load_detector(path: Path = WEIGHTS) -> Detector:
    """A detector from safetensors and the card beside them. Raises RlhfImgError if either is missing or misfits."""
    card_path = path.with_suffix(".json")
    for file in (path, card_path):
        if not file.is_file():
            raise RlhfImgError(
                f"artifact: no file {file}. Make weights and card with: rlhf-img reward train artifact --out {path}"
            )
    card: dict[str, Any] = json.loads(card_path.read_text())
    if tuple(card["classes"]) not in (CLASSES, CLASSES + APPEARANCES):
        raise RlhfImgError(
            f"artifact: the weights at {path} know the classes {card['classes']}, this version expects "
            f"{list(CLASSES)}. Train them again with: rlhf-img reward train artifact"
        )
    name = card.get("backbone")
    net = DefectNet(None if name is None else open_backbone(name), card["classes"])
    try:
        net.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise RlhfImgError(
            f"artifact: the weights at {path} are of another network than this version's. Train them again with: "
            "rlhf-img reward train artifact"
        ) from error
    return Detector(net=net.eval().to(memory_format=torch.channels_last), side=int(card["side"]))  # type: ignore[call-overload]


def _small_features() -> nn.Sequential:
    return nn.Sequential(
        _layer(3, 16),
        _layer(16, 32, stride=2),
        _Residual(32),
        _layer(32, _WIDTH, stride=2),
        _Residual(_WIDTH),
        _Residual(_WIDTH, dilation=2),
        _Residual(_WIDTH, dilation=4),
        _Residual(_WIDTH),
    )


class _Residual(nn.Module):
    """A layer beside a shortcut, through which the layers below learn from the first step."""

    def __init__(self, width: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.layer = _layer(width, width, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def _layer(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
