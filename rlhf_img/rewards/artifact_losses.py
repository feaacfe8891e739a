"""What the defect detector is taught by: targets of which parts may be unknown, and losses on what is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_img.rewards.artifact_model import log_p_damaged
from rlhf_img.rewards.artifact_pairs import Pairs, cells_touched
from rlhf_img.rewards.calibration import image_loss, known_cross_entropy
from rlhf_img.rewards.defects import APPEARANCES, CLASSES

_BALANCE = 0.99
"""beta of `class_balance`: beyond about 1 / (1 - beta) = 100 images, further ones of a class say little new."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is true of B images. damaged_B: anything is broken. class_BK: of this class. cells_BKhw: and where.

    Classes and cells are 1, 0, or NaN where it is not known. broken_Bhw: where something is broken of which nobody
    says the class; None: nowhere.
    """

    damaged_B: Bool[Tensor, " B"]
    class_BK: Float[Tensor, "B K"]
    cells_BKhw: Float[Tensor, "B K h w"]
    broken_Bhw: Bool[Tensor, "B h w"] | None = None


def pair_targets(pairs: Pairs, heat_BKhw: Float[Tensor, "B K h w"]) -> Targets:
    """Of the clean images and then of their damaged twins; K and the cells as of the detector's heat maps of them."""
    n, (classes, height, width) = len(pairs.class_B), heat_BKhw.shape[1:]
    kinds_BS = torch.cat([torch.zeros(n, len(CLASSES)), F.one_hot(pairs.class_B, len(CLASSES)).float()])
    where = cells_touched(pairs.mask_BHW, heat_BKhw).repeat(2, 1, 1, 1)
    if classes == len(CLASSES):
        return Targets(damaged_B=kinds_BS.any(dim=1), class_BK=kinds_BS, cells_BKhw=kinds_BS[..., None, None] * where)
    looks_BA = pairs.appearance_BA.repeat(2, 1)
    cells_BA = looks_BA.clone()
    # Bokeh leaves a part of the image sharp, the other looks are everywhere.
    cells_BA[looks_BA[:, APPEARANCES.index("bokeh")] == 1, APPEARANCES.index("bokeh")] = torch.nan
    cells_BAhw = cells_BA[..., None, None].expand(-1, -1, height, width)
    return Targets(damaged_B=kinds_BS.any(dim=1), class_BK=torch.cat([kinds_BS, looks_BA], dim=1),
                   cells_BKhw=torch.cat([kinds_BS[..., None, None] * where, cells_BAhw], dim=1))


def nothing_broken(heat_BKhw: Float[Tensor, "B K h w"]) -> Targets:
    """Of clean images in looks of which nothing is said."""
    batch, classes = heat_BKhw.shape[:2]
    class_BK = torch.zeros(batch, classes)
    class_BK[:, len(CLASSES) :] = torch.nan
    return Targets(damaged_B=torch.zeros(batch, dtype=torch.bool), class_BK=class_BK,
                   cells_BKhw=class_BK[..., None, None].expand_as(heat_BKhw))


def detector_loss(
    heat_BKhw: Float[Tensor, "B K h w"], logits_BK: Float[Tensor, "B K"], target: Targets, heat_weight: float
) -> Float[Tensor, " B"]:
    """Loss of each image: that of its whole (see `image_loss`), plus the cross-entropies of its cells.

    In a cell where something of unknown class is broken, that is -log P(a defect of whichever class).
    """
    per_cell = known_cross_entropy(heat_BKhw, target.cells_BKhw).mean(dim=(2, 3)).sum(1)
    if target.broken_Bhw is not None:
        log_damaged = log_p_damaged(heat_BKhw[:, : len(CLASSES)].movedim(1, -1).flatten(0, 2))
        per_cell = per_cell - (log_damaged.view_as(target.broken_Bhw) * target.broken_Bhw).mean(dim=(1, 2))
    return image_loss(logits_BK, target.class_BK, target.damaged_B) + heat_weight * per_cell


def style_variance(
    logits_BK: Float[Tensor, "B K"], restyled_BK: Float[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """sum_k (p_k - p'_k)^2 of each image and the same image in another look: what the look changes about the verdict.

    Both pull each other. Source: the consistency term of Laine and Aila 2017, arXiv:1610.02242, on looks.
    """
    return (logits_BK.sigmoid() - restyled_BK.sigmoid()).square().sum(dim=1)


def class_balance(counts: Mapping[str, int], images: Sequence[Sequence[str]], beta: float = _BALANCE) -> list[float]:
    """A weight for each image by its rarest class, of n images: (1 - beta) / (1 - beta^n), scaled to a mean of 1.

    counts: images of each class. images: the classes of each. Source: Cui et al. 2019, arXiv:1901.05555.

    >>> class_balance({"clean": 2, "hole": 1}, [["clean"], ["clean"], ["hole"]], beta=0.5)
    [0.857143, 0.857143, 1.285714]
    """
    raw = [max((1 - beta) / (1 - beta ** counts[name]) for name in names) for names in images]
    return [round(weight * len(raw) / sum(raw), 6) for weight in raw]
