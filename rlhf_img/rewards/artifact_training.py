"""Makes the artifact reward's weights: clean pictures in many looks against locally damaged twins in the same look."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.artifact_labels import Labelled
from rlhf_img.rewards.artifact_losses import detector_loss, nothing_broken, pair_targets, style_variance
from rlhf_img.rewards.artifact_measure import HELDOUT_SEED, auc, evaluate, evaluate_labelled, look_at
from rlhf_img.rewards.artifact_model import DefectNet, load_detector
from rlhf_img.rewards.artifact_pairs import PLAYGROUND, CleanTransform, PairSource
from rlhf_img.rewards.backbones import open_backbone
from rlhf_img.rewards.calibration import calibrate
from rlhf_img.rewards.defects import APPEARANCES, CLASSES
from rlhf_img.rewards.folder_images import digest

_WATCHED = 135
"""Held-out pairs on which the curve is drawn while training."""

_CALIBRATED = 270
"""Pairs on which probabilities are calibrated."""


@dataclass(frozen=True, kw_only=True)
class ArtifactTraining:
    """How the detector is trained.

    steps: optimiser steps. pairs: clean and damaged twins a step. labelled: labelled images a step, where there are
    any. lr: peak learning rate of AdamW, warmed up over 5 % of the steps and brought to 0 by a cosine. weight_decay: of
    AdamW. heat_weight: weight of the heat maps' loss beside the images'. style_weight: of `style_variance`; with 0 the
    clean twins are not seen in a second look, which saves a third of the work. appearance: also learn the classes of
    looks, `APPEARANCES`. seed: of everything.
    save_every: steps between checkpoints.
    """

    steps: int = 6000
    pairs: int = 27
    labelled: int = 27
    lr: float = 3e-3
    weight_decay: float = 1e-2
    heat_weight: float = 20.0
    style_weight: float = 1.0
    appearance: bool = False
    seed: int = 0
    save_every: int = 100

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the detector's outputs."""
        return CLASSES + (APPEARANCES if self.appearance else ())


AGAIN = ArtifactTraining(steps=2000, lr=1e-3)
"""Of weights that are there already and are to learn more."""


def train_artifact(
    out: Path,
    config: ArtifactTraining,
    *,
    source: PairSource = PLAYGROUND,
    labels: Labelled | None = None,
    resume: bool = False,
    clean_transform: CleanTransform | None = None,
    backbone: str | None = None,
    weights: Path | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Trains the detector; writes `out` (safetensors) and its card (.json); returns the card.

    The same config and source give the same weights on the same machine, whether interrupted and resumed or not: each
    step's batch depends on the seed and the step only. labels: images that somebody has labelled, to learn from beside
    the pairs. backbone: a model of `open_backbone` to put a head on; None: the small network is trained from nothing.
    weights: those of a small network to go on from. At the end the probabilities are calibrated on pairs of split
    "val", of which the playground has other scenes than of "heldout", and photographs other crops. `progress` is called
    with the step and its loss. Raises RlhfImgError if the checkpoint to resume is of another config, source, labels or
    weights.
    """
    if labels is not None and labels.pixels_NHW3.shape[1] != source.side:
        raise RlhfImgError(f"labelled images of {labels.pixels_NHW3.shape[1]} px do not fit pairs of {source.side} px")
    checkpoint = out.with_suffix(".resume.pt")
    torch.manual_seed(config.seed)
    net = _begin(config, backbone) if weights is None else _go_on_from(weights, config, source.side)
    settings = {**asdict(config), "side": source.side, "pictures": source.fingerprint,
                "labels": None if labels is None else labels.fingerprint, "autoencoder": clean_transform is not None,
                "backbone": backbone, "weights": None if weights is None else digest(weights.read_bytes())}
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    start, curve = _restore(checkpoint, settings, net, optimizer) if resume else (0, [])
    out.parent.mkdir(parents=True, exist_ok=True)
    watched = source.pairs(_WATCHED, split="heldout", seed=(HELDOUT_SEED, 2), transform=clean_transform)
    losses: list[float] = []
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(step, config.steps)
        losses.append(_step(net.train(), optimizer, config, step, source, clean_transform, labels))
        progress(step + 1, losses[-1])
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            clean, damaged = (look_at(net.eval(), x)[0] for x in (watched.clean_B3HW, watched.damaged_B3HW))
            curve.append({"step": step + 1, "loss": sum(losses) / len(losses),
                          "heldout_auc": auc(damaged[watched.visible_B], clean)})
            losses = []
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                     "settings": settings, "curve": curve}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    _round(net)
    _calibrate(net.eval(), source, clean_transform)
    card = {"classes": list(net.classes), "side": source.side, "backbone": backbone, "config": asdict(config),
            "weights": settings["weights"], "pictures": source.card(),
            "labelled": None if labels is None else evaluate_labelled(net.eval(), labels),
            "vae_reconstructions": clean_transform is not None, "torch": torch.__version__,
            "heldout": evaluate(net.eval(), source=source, transform=clean_transform), "curve": curve}
    _write(out, net, card)
    checkpoint.unlink(missing_ok=True)
    return card


def _begin(config: ArtifactTraining, backbone: str | None) -> DefectNet:
    tower = None if backbone is None else open_backbone(backbone)
    return DefectNet(tower, config.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _go_on_from(weights: Path, config: ArtifactTraining, side: int) -> DefectNet:
    """The network of weights that are there. Raises RlhfImgError if they judge other images or other classes."""
    given = load_detector(weights)
    if given.side != side or given.net.backbone is not None or given.net.classes != config.classes:
        raise RlhfImgError(
            f"artifact training: {weights} cannot be gone on from: it is of {given.side} px, knows "
            f"{', '.join(given.net.classes)}{'' if given.net.backbone is None else ' and has a backbone'}; wanted are "
            f"{side} px and {', '.join(config.classes)} without a backbone. Give other weights, or none to begin anew"
        )
    return given.net


def _round(net: DefectNet) -> None:
    """Convolutions to 16 bits, as which they are written: the card is of what is read back."""
    for weight in net.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.half().float()


def _write(out: Path, net: DefectNet, card: dict[str, Any]) -> None:
    """The weights and their card, each whole or not at all."""
    hidden = out.with_suffix(".part")
    save_file({k: (v.half() if v.ndim == 4 else v).contiguous() for k, v in net.state_dict().items()}, hidden)
    os.replace(hidden, out)
    hidden.write_text(json.dumps(card, indent=2) + "\n")
    os.replace(hidden, out.with_suffix(".json"))


@torch.no_grad()
def _calibrate(net: DefectNet, source: PairSource, transform: CleanTransform | None) -> None:
    pairs = source.pairs(_CALIBRATED, split="val", seed=(HELDOUT_SEED, 3), transform=transform)
    images = torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW])
    heat = torch.cat([net(part) for part in images.split(56)])
    shown = torch.cat([torch.ones_like(pairs.visible_B), pairs.visible_B])
    targets = pair_targets(pairs, heat)
    with torch.enable_grad():
        calibrate(net, heat[shown], targets.class_BK[shown], targets.damaged_B[shown])


def _step(
    net: DefectNet, optimizer: torch.optim.Optimizer, config: ArtifactTraining, step: int, source: PairSource,
    transform: CleanTransform | None, labels: Labelled | None = None,
) -> float:  # fmt: skip
    pairs = source.pairs(config.pairs, split="train", seed=(config.seed, step), transform=transform)
    parts = [pairs.clean_B3HW, pairs.damaged_B3HW]
    parts += [pairs.restyled_B3HW] if config.style_weight else []
    n, images = config.pairs, torch.cat(parts)
    places, mirrored = _drawn(labels, config, step)
    if labels is not None:
        images = torch.cat([images, labels.images(places, mirrored)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heat = net(images)
    heat = heat.float()
    logits = net.pool(heat)
    losses = detector_loss(heat[: 2 * n], logits[: 2 * n], pair_targets(pairs, heat), config.heat_weight)
    losses = losses[torch.cat([torch.ones_like(pairs.visible_B), pairs.visible_B])]
    if config.style_weight:
        again = slice(2 * n, 3 * n)
        restyled = detector_loss(heat[again], logits[again], nothing_broken(heat[again]), config.heat_weight)
        losses = torch.cat([losses, restyled])
    if labels is not None:
        targets = labels.targets(places, (heat.shape[2], heat.shape[3]), mirrored)
        own = detector_loss(heat[-len(places) :], logits[-len(places) :], targets, config.heat_weight)
        losses = torch.cat([losses, own * labels.weights_N[places]])
    mean = losses.mean()
    if config.style_weight:
        defects = logits[:, net.structural]
        mean = mean + config.style_weight * style_variance(defects[:n], defects[again]).mean()
    if not torch.isfinite(mean):
        raise RlhfImgError(f"artifact training: the loss is {mean.item()} at step {step}; try a lower learning rate.")
    optimizer.zero_grad(set_to_none=True)
    mean.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return float(mean.detach())


def _drawn(labels: Labelled | None, config: ArtifactTraining, step: int) -> tuple[np.ndarray, Tensor]:
    """Places of a step's labelled images, and which of them are mirrored."""
    rng = np.random.default_rng((config.seed, step, 1))
    if labels is None:
        return np.zeros(0, int), torch.zeros(0, dtype=torch.bool)
    return rng.choice(labels.train, config.labelled), torch.from_numpy(rng.random(config.labelled) < 0.5)


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _restore(
    path: Path, settings: dict[str, Any], net: DefectNet, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """The step to go on from and the curve so far; 0 and none if there is no checkpoint.

    Raises RlhfImgError if the checkpoint is of other settings or pictures.
    """
    if not path.is_file():
        return 0, []
    state = torch.load(path, weights_only=True)
    before = state.get("settings", {})
    changed = [f"{key} was {before.get(key, 'not known')}, is {value}" for key, value in settings.items()
               if before.get(key) != value]
    if changed:
        raise RlhfImgError(
            f"artifact training: the checkpoint {path} is of another training: {'; '.join(changed)}. Give the same "
            f"settings and pictures, or start anew without --resume."
        )
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), list(state["curve"])
