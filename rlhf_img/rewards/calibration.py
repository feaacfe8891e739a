"""From evidence to probabilities: the loss they are fitted by, the fit on held-out pairs, and how far off they are."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_img.rewards.artifact_model import log_p_clean, log_p_damaged
from rlhf_img.rewards.defects import CLASSES

if TYPE_CHECKING:
    from rlhf_img.rewards.artifact_model import DefectNet


def image_loss(
    logits_BK: Float[Tensor, "B K"], target_BK: Float[Tensor, "B K"], damaged_B: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """-log P(clean) or -log P(damaged) of each image, plus the cross-entropies of its classes; NaN: not known.

    The classes of looks, which come after those of `CLASSES`, make no image damaged.
    """
    defects_BK = logits_BK[:, : len(CLASSES)]
    image = -torch.where(damaged_B, log_p_damaged(defects_BK), log_p_clean(defects_BK))
    return image + known_cross_entropy(logits_BK, target_BK).sum(1)


def known_cross_entropy(logits: Float[Tensor, "*axes"], target: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Binary cross-entropy of each entry; 0, without a gradient, where the target is NaN."""
    known = ~target.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(0.0), reduction="none")
    return torch.where(known, loss, 0.0)


def calibrate(
    net: "DefectNet", heat_BKhw: Float[Tensor, "B K h w"], target_BK: Float[Tensor, "B K"],
    damaged_B: Bool[Tensor, " B"],
) -> None:  # fmt: skip
    """Fits the net's scale and bias of each class (Platt scaling) to images it was not trained on, in place.

    Source: Platt 1999, "Probabilistic outputs for support vector machines".
    """
    fitted = [net.scale, net.bias]
    optimizer = torch.optim.LBFGS(fitted, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A scale must stay positive, and a class without examples where it was: hence the weak pull.
        pull = 1e-3 * (net.scale - 1).square().sum() + 1e-3 * net.bias.square().sum()
        loss = image_loss(net.pool(heat_BKhw), target_BK, damaged_B).mean() + pull
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


def calibration_error(p_N: Float[Tensor, " N"], happened_N: Bool[Tensor, " N"], bins: int = 15) -> float:
    """Expected calibration error: over bins of equal width, mean |share that happened - mean probability|, by size.

    0 is calibrated. Source: Guo et al. 2017, arXiv:1706.04599.

    >>> calibration_error(torch.tensor([0.9, 0.9, 0.1]), torch.tensor([True, False, False]))
    0.3
    """
    place = (p_N * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, happened_N.double() - p_N.double())
    return round(float(gap.abs().sum() / len(p_N)), 6)
