"""How good a defect detector is: on pairs it was not trained on, and on clean images in every style."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_img.playground.scene import SIZE
from rlhf_img.rewards.artifact_labels import Labelled
from rlhf_img.rewards.artifact_model import DefectNet, log_p_clean
from rlhf_img.rewards.artifact_pairs import PLAYGROUND, CleanTransform, PairSource, cells_touched
from rlhf_img.rewards.calibration import calibration_error
from rlhf_img.rewards.defects import CLASSES

HELDOUT_SEED = 10_000


@torch.inference_mode()
def evaluate(
    net: DefectNet,
    *,
    source: PairSource = PLAYGROUND,
    n: int | None = None,
    seed: int = HELDOUT_SEED,
    transform: CleanTransform | None = None,
    heat_of: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """How well the detector tells clean from damaged on pictures, compositions and seeds it was not trained on.

    n: pairs; by default 1026 of 64 px, and fewer of larger images. Returns AUC over all and per class, the share of
    damaged images found at the threshold that takes 5 % of the clean ones for damaged, the share of clean images of
    each style taken for damaged at the thresholds that find 90 % and 95 % of the damaged ones, mean P(clean), and how
    often the hottest cell of a damaged image lies on its damage or beside it (and how often any cell does), and the
    expected calibration error of P(damaged). heat_of: makes the heat maps instead of the net.
    """
    n = max(135, 1026 * SIZE**2 // source.side**2) if n is None else n
    pairs = source.pairs(n, split="heldout", seed=(seed,), transform=transform)
    visible = pairs.visible_B
    clean, _ = look_at(net, pairs.clean_B3HW, heat_of)
    damaged, heat_Bhw = look_at(net, pairs.damaged_B3HW[visible], heat_of)
    kinds = pairs.class_B[visible]
    scores = {"random looks": clean, **{name: look_at(net, x, heat_of)[0] for name, x in source.styled(n // 2, seed)}}

    def false_positives(recall: float) -> dict[str, float]:
        threshold = torch.quantile(damaged, 1 - recall)
        return {name: float((values >= threshold).float().mean()) for name, values in scores.items()}

    at_5 = torch.quantile(clean, 0.95)
    broken = torch.arange(len(clean) + len(damaged)) >= len(clean)
    hits, by_chance = heat_hits(heat_Bhw, pairs.mask_BHW[visible])
    return {
        "images": {"clean": n, "damaged": len(damaged), "styled": n // 2},
        "auc": auc(damaged, clean),
        "auc_per_class": _per_class(lambda chosen: auc(damaged[chosen], clean), kinds),
        "recall_at_5_false_positives": float((damaged > at_5).float().mean()),
        "recall_at_5_false_positives_per_class": _per_class(
            lambda chosen: float((damaged[chosen] > at_5).float().mean()), kinds),
        "calibration_error": calibration_error(1 - torch.exp(-torch.cat([clean, damaged])), broken),
        "false_positives_at_90_recall": false_positives(0.9),
        "false_positives_at_95_recall": false_positives(0.95),
        "mean_reward": {"clean": float(torch.exp(-clean).mean()), "damaged": float(torch.exp(-damaged).mean()),
                        **{name: float(torch.exp(-values).mean()) for name, values in list(scores.items())[1:]}},
        "heat_hits": {"hottest cell": float(hits.float().mean()), "any cell": by_chance,
                      **_per_class(lambda chosen: float(hits[chosen].float().mean()), kinds)},
    }


@torch.inference_mode()
def evaluate_labelled(net: DefectNet, labels: Labelled) -> dict[str, Any]:
    """How well the detector tells labelled images apart that it was not trained on; None where a side is missing."""
    damaged_B = labels.targets(labels.heldout, (1, 1)).damaged_B
    scores = look_at(net, labels.images(labels.heldout))[0]
    both = bool(damaged_B.any() and not damaged_B.all())
    return {
        "images": labels.counts, "held out": {"clean": int((~damaged_B).sum()), "damaged": int(damaged_B.sum())},
        "auc": auc(scores[damaged_B], scores[~damaged_B]) if both else None, "fingerprint": labels.fingerprint,
    }


def _per_class(measure: Callable[[Tensor], float], kinds: Tensor) -> dict[str, float]:
    """A measure of each class, by its name; of a class without visible damage there is none."""
    return {name: measure(kinds == k) for k, name in enumerate(CLASSES) if (kinds == k).any()}


def heat_hits(heat_Bhw: Tensor, mask_BHW: Tensor) -> tuple[Tensor, float]:
    """Whether the hottest cell of each image lies within one cell of its mask, and the share of cells that do."""
    near = F.max_pool2d(cells_touched(mask_BHW, heat_Bhw), 3, stride=1, padding=1).flatten(1) > 0
    hottest = heat_Bhw.flatten(1).argmax(dim=1, keepdim=True)
    return near.gather(1, hottest)[:, 0], float(near.float().mean())


def auc(positive_N: Float[Tensor, " N"], negative_M: Float[Tensor, " M"]) -> float:
    """Probability that a positive scores above a negative, ties counted half; 0.5 is chance.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    order = torch.searchsorted(negative_M.sort().values, torch.stack([positive_N, positive_N]),
                               right=False).double()
    above = torch.searchsorted(negative_M.sort().values, positive_N, right=True).double()
    return float((order[0] + above).mean() / (2 * len(negative_M)))


@torch.inference_mode()
def look_at(
    net: DefectNet, images: Tensor, heat_of: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """-log P(clean) of each image (B,), and the logit of its likeliest defect in each cell (B, h, w)."""
    heats = [(heat_of or net)(part) for part in images.split(256)]
    return (torch.cat([-log_p_clean(net.pool(heat)[:, net.structural]) for heat in heats]),
            torch.cat([heat[:, net.structural].amax(dim=1) for heat in heats]))
