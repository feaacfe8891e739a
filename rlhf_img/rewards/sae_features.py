"""What the features of a sparse autoencoder tell, a defect or a style: measured, shown, and named by a judge."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf_img.judges import Ask, Judge
from rlhf_img.rewards.allow_list import CARD_FILE, AllowList, Feature, FeatureList, Mark, embedding_of
from rlhf_img.rewards.artifact_measure import HELDOUT_SEED, auc, evaluate
from rlhf_img.rewards.artifact_model import DefectNet
from rlhf_img.rewards.artifact_pairs import PairSource
from rlhf_img.rewards.sae import SparseAutoencoder, cells_of
from rlhf_img.rewards.sae_training import SaeTraining

QUESTION = "Does this image show {name}?"
_NAMED = 0.2
"""By how much P(yes) must be higher on a feature's images than on others, for a judge's name to be taken."""
_OTHERS = 16
"""Images on which a name is asked for comparison."""
_MEASURED = 280
"""Pairs of 64 px on which features are measured, with half as many images of each style; fewer of larger ones."""
_FEWEST = 56
_CLEAR = 0.05
"""AUC above chance from which a feature tells something."""
_LEAD = 2.0
"""Times by which it must tell more of the one (defects, or one style) than of the other, to be proposed as such."""




@torch.no_grad()
def activations(net: DefectNet, sae: SparseAutoencoder, images_B3HW: Tensor) -> Tensor:
    """How active each feature is in its most active cell of each image, (B, F)."""
    return torch.cat([sae.encode(cells_of(net, part)[0]).unflatten(0, (len(part), -1)).amax(dim=1)
                      for part in images_B3HW.split(32)])


def _pairs_of(source: PairSource, n: int | None) -> int:
    return max(_FEWEST, _MEASURED * 64**2 // source.side**2) if n is None else n


def measure_features(
    net: DefectNet, sae: SparseAutoencoder, source: PairSource, *, n: int | None = None
) -> list[Feature]:
    """Every feature that is alive on n pairs of split "val", with what it tells and what is proposed to mark it as.

    defect_auc: of damaged against clean images in the same looks. style_auc: of clean images in `style`, the one of all
    styles that the feature tells best, against the same images without. The clearest come first.
    """
    n = _pairs_of(source, n)
    pairs = source.pairs(n, split="val", seed=(HELDOUT_SEED, 5))
    clean, damaged = (activations(net, sae, x) for x in (pairs.clean_B3HW, pairs.damaged_B3HW[pairs.visible_B]))
    styled = {name: activations(net, sae, x) for name, x in source.styled(n // 2, HELDOUT_SEED + 5)}
    plain = styled.pop("no style")
    found = []
    for i in torch.cat([clean, damaged]).amax(dim=0).nonzero().flatten().tolist():
        of_defects = auc(damaged[:, i].contiguous(), clean[:, i].contiguous())
        of_styles = {name: auc(x[:, i].contiguous(), plain[:, i].contiguous()) for name, x in styled.items()}
        style = max(of_styles, key=of_styles.__getitem__)
        found.append(Feature(id=i, defect_auc=round(of_defects, 3), style=style, style_auc=round(of_styles[style], 3),
                             proposed=_proposed(of_defects - 0.5, of_styles[style] - 0.5)))
    return sorted(found, key=lambda f: -max(f.defect_auc or 0, f.style_auc or 0))


def _proposed(defect: float, style: float) -> Mark | None:
    """What a feature may be marked as, from its AUCs above chance."""
    if defect >= _CLEAR and defect >= _LEAD * max(style, 0):
        return "artifact"
    return "style" if style >= _CLEAR and style >= _LEAD * max(defect, 0) else None


def sae_card(
    net: DefectNet, sae: SparseAutoencoder, source: PairSource, features: list[Feature], config: SaeTraining,
    curve: list[dict[str, float]], *, head: bool, n: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What is measured on n held-out pairs that neither trained the autoencoder nor chose the marks.

    explained_variance, dead (share of features), active (features a cell), and `separation`: of the features that are
    proposed as artifact, and as style, together (the sum of their activations): AUC of damaged against clean, and the
    AUC of each style against none. With a trained head also `reward`: its figures without a list, and with the
    proposals taken for marks.
    """
    n = _pairs_of(source, n)
    pairs = source.pairs(n, split="heldout", seed=(HELDOUT_SEED, 6))
    clean, damaged = (activations(net, sae, y) for y in (pairs.clean_B3HW, pairs.damaged_B3HW[pairs.visible_B]))
    styled = {name: activations(net, sae, y) for name, y in source.styled(n // 2, HELDOUT_SEED + 6)}
    plain = styled.pop("no style")
    separation = {}
    for mark in ("artifact", "style"):
        chosen = [f.id for f in features if f.proposed == mark]
        of_styles = {name: auc(y[:, chosen].sum(dim=1), plain[:, chosen].sum(dim=1)) for name, y in styled.items()}
        separation[mark] = {"features": len(chosen), "styles": of_styles,
                            "defects": auc(damaged[:, chosen].sum(dim=1), clean[:, chosen].sum(dim=1))}
    return {
        "embedding": embedding_of(net), "width": len(sae.center_C), "config": asdict(config), "side": source.side,
        "pictures": source.card(), **reconstruction(net, sae, torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW])),
        "separation": separation, "reward": _reward(net, sae, source, features, n) if head else None, "curve": curve,
    }


@torch.no_grad()
def reconstruction(net: DefectNet, sae: SparseAutoencoder, images_B3HW: Tensor) -> dict[str, float]:
    """`explained_variance` of the cells of some images, `dead`: the share of features that are active in none of them,
    `active`: features a cell. Sums over parts, because all cells of large images together are too much."""
    total, squares, error, active, cells = (torch.zeros((), dtype=torch.float64) for _ in range(5))
    fired = torch.zeros(len(sae.bias_F), dtype=torch.bool)
    for part in images_B3HW.split(8):
        x, _ = cells_of(net, part)
        z = sae.encode(x)
        total = total + x.double().sum(dim=0)
        squares += x.double().square().sum()
        error += (x - sae.decode(z)).double().square().sum()
        active += (z > 0).sum()
        cells += len(x)
        fired |= (z > 0).any(dim=0)
    variance = squares - (total.square() / cells).sum()
    return {"explained_variance": 1 - float(error / variance), "dead": float((~fired).float().mean()),
            "active": float(active / cells)}


def _reward(
    net: DefectNet, sae: SparseAutoencoder, source: PairSource, features: Sequence[Feature], n: int
) -> dict[str, Any]:
    listed = FeatureList(sae="", features=tuple(replace(f, mark=f.proposed) for f in features))
    allowed = AllowList(listed=listed, sae=sae)
    figures = ("auc", "recall_at_5_false_positives", "false_positives_at_95_recall")
    found = {"without": evaluate(net, source=source, n=n),
             "proposed": evaluate(net, source=source, n=n, heat_of=lambda images: allowed(net, images)[1])}
    return {name: {figure: of[figure] for figure in figures} for name, of in found.items()}


def pool_of(source: PairSource, n: int) -> Tensor:
    """Images to look at (3 n, 3, H, W): n clean ones, the same damaged, and the same in another look."""
    pairs = source.pairs(n, split="val", seed=(HELDOUT_SEED, 7))
    return torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW, pairs.restyled_B3HW])


@dataclass(frozen=True, kw_only=True)
class Top:
    """An image on which a feature is active. place: in the pool. heat_hw: where, 1 in its most active cell of all."""

    place: int
    activation: float
    heat_hw: npt.NDArray[np.float32]


@torch.no_grad()
def top_images(
    net: DefectNet, sae: SparseAutoencoder, pool_B3HW: Tensor, ids: Sequence[int], count: int
) -> dict[int, list[Top]]:
    """Of each feature the `count` images of a pool in which it is most active in one cell, the highest first."""
    peak_BF = activations(net, sae, pool_B3HW)
    found: dict[int, list[Top]] = {}
    for i in ids:
        values, places = peak_BF[:, i].topk(min(count, len(peak_BF)))
        found[i] = [Top(place=place, activation=value, heat_hw=_where(net, sae, pool_B3HW[place], i) / values[0].item())
                    for value, place in zip(values.tolist(), places.tolist(), strict=True) if value > 0]
    return found


def _where(net: DefectNet, sae: SparseAutoencoder, image_3HW: Tensor, i: int) -> npt.NDArray[np.float32]:
    """The activation of feature i in each cell of an image, (h, w)."""
    x, size = cells_of(net, image_3HW[None])
    return np.asarray(sae.encode(x)[:, i].unflatten(0, size).numpy())


def name_features(
    judge: Judge, pool: Sequence[npt.NDArray[np.uint8]], tops: dict[int, list[Top]], names: Sequence[str]
) -> dict[int, str]:
    """A name for each feature of `tops` for which a judge finds one among `names`.

    The one whose P(yes) is highest on the feature's images, above that on other images of the pool, by 0.2 at least.
    Questions that the judge could not answer are left out. Raises what `Judge.ask` raises.
    """
    others = list(range(0, len(pool), max(1, len(pool) // _OTHERS)))
    places = sorted({*others, *(top.place for of in tops.values() for top in of)})
    asks = [(place, name) for place in places for name in names]
    answers = judge.ask([Ask(image=pool[p], question=QUESTION.format(name=name)) for p, name in asks])
    p_yes = {key: a.p_yes for key, a in zip(asks, answers, strict=True)}

    def mean(chosen: Sequence[int], name: str) -> float:
        known = [p for place in chosen if (p := p_yes[place, name]) is not None]
        return float(np.mean(known)) if known else float("nan")

    usual = {name: mean(others, name) for name in names}
    found = {}
    for i, of in tops.items():
        gain = {name: mean([top.place for top in of], name) - usual[name] for name in names}
        known = {name: value for name, value in gain.items() if value >= _NAMED}  # False where not known
        if known:
            found[i] = max(known, key=known.__getitem__)
    return found


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """The card, whole or not at all."""
    hidden = folder / "card.part"
    hidden.write_text(json.dumps(card, indent=2) + "\n")
    os.replace(hidden, folder / CARD_FILE)
