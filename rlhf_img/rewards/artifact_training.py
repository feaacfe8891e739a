"""Makes the artifact reward's weights: clean pictures in many looks against locally damaged twins in the same look."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import SIZE, STYLES, Scene, Split, sample_scene
from rlhf_img.rewards.appearance import Look, random_look
from rlhf_img.rewards.artifact_model import DefectNet, log_p_clean
from rlhf_img.rewards.backbones import open_backbone
from rlhf_img.rewards.calibration import calibrate, calibration_error, image_loss
from rlhf_img.rewards.defects import CLASSES, inject, object_masks

_HELDOUT_SEED = 10_000
_WATCHED = 140
"""Held-out pairs on which the curve is drawn while training."""

CleanTransform = Callable[[Tensor], Tensor]
"""Leaves a clean image clean, such as a VAE's reconstruction: (B, 3, H, W) in [0, 1] to the same."""

_CALIBRATED = 280
"""Pairs on which probabilities are calibrated."""

_VISIBLE_PX = 16
"""A defect that changes fewer pixels clearly, after the look, is not taught: its label would be noise."""


@dataclass(frozen=True, kw_only=True)
class ArtifactTraining:
    """How the detector is trained.

    steps: optimiser steps. pairs: clean and damaged twins a step. lr: peak learning rate of AdamW, warmed up over
    5 % of the steps and brought to 0 by a cosine. weight_decay: of AdamW. heat_weight: weight of the heat maps' loss
    beside the images'. seed: of everything. save_every: steps between checkpoints.
    """

    steps: int = 4000
    pairs: int = 28
    lr: float = 3e-3
    weight_decay: float = 1e-2
    heat_weight: float = 20.0
    seed: int = 0
    save_every: int = 100


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Clean images and their damaged twins, in [0, 1]; which class, where, and whether the damage is visible."""

    clean_B3HW: Tensor
    damaged_B3HW: Tensor
    class_B: Tensor
    mask_BHW: Tensor
    visible_B: Tensor


@runtime_checkable
class PairSource(Protocol):
    """Where matched pairs come from: the playground, or somebody's pictures."""

    @property
    def side(self) -> int:
        """Height and width of the images in pixels."""

    @property
    def fingerprint(self) -> str:
        """What must not change between the parts of an interrupted training."""

    def pairs(self, n: int, *, split: Split, seed: tuple[int, ...], transform: CleanTransform | None = None) -> Pairs:
        """n matched pairs, the same for the same seed; nothing held out is trained on."""

    def styled(self, n: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        """For each style its name and n clean held-out images in it, (n, 3, H, W) in [0, 1]."""

    def card(self) -> dict[str, Any]:
        """What the pictures are, for the card of the weights."""


@dataclass(frozen=True, kw_only=True)
class Playground:
    """Pairs of the playground's renders."""

    side: int = SIZE
    fingerprint: str = "playground"

    def pairs(self, n: int, *, split: Split, seed: tuple[int, ...], transform: CleanTransform | None = None) -> Pairs:
        """See `make_pairs`."""
        return make_pairs(n, split=split, seed=seed, transform=transform)

    def styled(self, n: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Clean renders of unseen compositions in each of the playground's own styles."""
        for style in (*STYLES, None):
            rng = np.random.default_rng((seed, 1))
            scenes = [replace(sample_scene(rng, "heldout"), style=style) for _ in range(n)]
            yield style or "no style", _tensor([render(scene, seed=i) for i, scene in enumerate(scenes)])

    def card(self) -> dict[str, Any]:
        """Nothing but their name: they are the same everywhere."""
        return {"from": self.fingerprint}


def make_pairs(
    n: int, *, split: Split, seed: tuple[int, ...], look: Look | None = None, transform: CleanTransform | None = None
) -> Pairs:
    """n matched pairs of the playground, the same for the same seed; a random look unless one is given.

    `transform` is applied to both twins of half of the pairs: to clean ones alone, it would itself mean "clean".
    """
    rng = np.random.default_rng(seed)
    clean: list[np.ndarray] = []
    damaged: list[np.ndarray] = []
    classes: list[int] = []
    while len(clean) < n:
        scene = _off_grid(replace(sample_scene(rng, split), style=None), rng)
        image = render(scene)
        k = len(clean) % len(CLASSES)
        broken = inject(CLASSES[k], image, object_masks(scene), rng)
        if broken is None:
            continue
        clean.append(image)
        damaged.append(broken)
        classes.append(k)
    if look is None:
        look = random_look(n, SIZE, torch.Generator().manual_seed(int(rng.integers(2**62))))
    return twins(clean, damaged, classes, look, transform)


def twins(
    clean: list[np.ndarray], damaged: list[np.ndarray], classes: list[int], look: Look, transform: CleanTransform | None
) -> Pairs:
    """Images uint8 (H, W, 3) and their damaged twins as pairs: both in the same look, and masked where they differ."""
    x, y = _tensor(clean), _tensor(damaged)
    if transform is not None:
        half = torch.arange(len(x)) % 2 == 0
        with torch.no_grad():
            x[half], y[half] = transform(x[half]).clamp(0, 1), transform(y[half]).clamp(0, 1)
    x, y = look(x), look(y)
    mask = (x - y).abs().amax(dim=1) > (0.12 + 1.5 * look.grain_B)[:, None, None]
    return Pairs(clean_B3HW=x, damaged_B3HW=y, class_B=torch.tensor(classes), mask_BHW=mask,
                 visible_B=mask.sum(dim=(1, 2)) >= _VISIBLE_PX)


def _off_grid(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene moved by up to 4 px, as far as it stays inside, and its things up to a fifth smaller.

    The playground has its things on a grid and in three sizes. A detector of defects must not learn that: what a
    model draws beside the grid is whole all the same.
    """
    moved = scene.things
    if scene.word is None:  # a word has a strip of its own, which things must not enter
        room = min(min(t.x, t.y, SIZE - t.x, SIZE - t.y) - t.radius for t in moved)
        dx, dy = rng.uniform(-1, 1, 2) * min(4.0, max(0.0, room))
        moved = tuple(replace(t, x=t.x + dx, y=t.y + dy) for t in moved)
    return replace(scene, things=tuple(replace(t, radius=t.radius * rng.uniform(0.8, 1)) for t in moved))


def detector_loss(
    heat_BKhw: Float[Tensor, "B K h w"],
    logits_BK: Float[Tensor, "B K"],
    target_BKhw: Float[Tensor, "B K h w"],
    damaged_B: Bool[Tensor, " B"],
    heat_weight: float,
) -> Float[Tensor, " B"]:
    """Loss of each image: that of its whole (see `image_loss`), plus the cross-entropies of its cells."""
    per_cell = F.binary_cross_entropy_with_logits(heat_BKhw, target_BKhw, reduction="none").mean(dim=(2, 3)).sum(1)
    return image_loss(logits_BK, target_BKhw.amax(dim=(2, 3)), damaged_B) + heat_weight * per_cell


def train_artifact(
    out: Path,
    config: ArtifactTraining,
    *,
    source: PairSource = Playground(),
    resume: bool = False,
    clean_transform: CleanTransform | None = None,
    backbone: str | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Trains the detector; writes `out` (safetensors) and its card (.json); returns the card.

    The same config and source give the same weights on the same machine, whether interrupted and resumed or not: each
    step's batch depends on the seed and the step only. backbone: a model of `open_backbone` to put a head on; None: the
    small network is trained from nothing. At the end the probabilities are calibrated on pairs of split "val", of which
    the playground has other scenes than of "heldout", and photographs other crops. `progress` is called with the step
    and its loss. Raises RlhfImgError if the checkpoint to resume is of another config or source.
    """
    checkpoint = out.with_suffix(".resume.pt")
    settings = {**asdict(config), "side": source.side, "pictures": source.fingerprint,
                "autoencoder": clean_transform is not None, "backbone": backbone}
    tower = None if backbone is None else open_backbone(backbone)
    torch.manual_seed(config.seed)
    net = DefectNet(tower).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    start, curve = _restore(checkpoint, settings, net, optimizer) if resume else (0, [])
    out.parent.mkdir(parents=True, exist_ok=True)
    watched = source.pairs(_WATCHED, split="heldout", seed=(_HELDOUT_SEED, 2), transform=clean_transform)
    losses: list[float] = []
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(step, config.steps)
        losses.append(_step(net.train(), optimizer, config, step, source, clean_transform))
        progress(step + 1, losses[-1])
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            clean, damaged = (_look_at(net.eval(), x)[0] for x in (watched.clean_B3HW, watched.damaged_B3HW))
            curve.append({"step": step + 1, "loss": sum(losses) / len(losses),
                          "heldout_auc": auc(damaged[watched.visible_B], clean)})
            losses = []
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                     "settings": settings, "curve": curve}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    _calibrate(net.eval(), source, clean_transform)
    card = {"classes": list(CLASSES), "side": source.side, "backbone": backbone, "config": asdict(config),
            "pictures": source.card(),
            "vae_reconstructions": clean_transform is not None, "torch": torch.__version__,
            "heldout": evaluate(net.eval(), source=source, transform=clean_transform), "curve": curve}
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out)
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return card


@torch.no_grad()
def _calibrate(net: DefectNet, source: PairSource, transform: CleanTransform | None) -> None:
    pairs = source.pairs(_CALIBRATED, split="val", seed=(_HELDOUT_SEED, 3), transform=transform)
    shown = pairs.visible_B
    images = torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW[shown]])
    heat = torch.cat([net(part) for part in images.split(56)])
    damaged = torch.arange(len(images)) >= len(pairs.clean_B3HW)
    target = torch.zeros(len(images), len(CLASSES))
    target[damaged] = F.one_hot(pairs.class_B[shown], len(CLASSES)).float()
    with torch.enable_grad():
        calibrate(net, heat, target, damaged)


def _step(
    net: DefectNet,
    optimizer: torch.optim.Optimizer,
    config: ArtifactTraining,
    step: int,
    source: PairSource,
    transform: CleanTransform | None,
) -> float:
    pairs = source.pairs(config.pairs, split="train", seed=(config.seed, step), transform=transform)
    images = torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW])
    damaged = torch.arange(len(images)) >= config.pairs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heat = net(images)
    heat = heat.float()
    cells = _cells(pairs.mask_BHW, heat)
    target = torch.zeros_like(heat)
    target[damaged] = F.one_hot(pairs.class_B, len(CLASSES))[..., None, None] * cells
    loss = detector_loss(heat, net.pool(heat), target, damaged, config.heat_weight)
    taught = torch.cat([torch.ones_like(pairs.visible_B), pairs.visible_B])
    mean = loss[taught].mean()
    if not torch.isfinite(mean):
        raise RlhfImgError(f"artifact training: the loss is {mean.item()} at step {step}; try a lower learning rate.")
    optimizer.zero_grad(set_to_none=True)
    mean.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return float(mean.detach())


@torch.inference_mode()
def evaluate(
    net: DefectNet,
    *,
    source: PairSource = Playground(),
    n: int | None = None,
    seed: int = _HELDOUT_SEED,
    transform: CleanTransform | None = None,
) -> dict[str, Any]:
    """How well the detector tells clean from damaged on pictures, compositions and seeds it was not trained on.

    n: pairs; by default 1022 of 64 px, and fewer of larger images. Returns AUC over all and per class, the share of
    damaged images found at the threshold that takes 5 % of the clean ones for damaged, the share of clean images of
    each style taken for damaged at the thresholds that find 90 % and 95 % of the damaged ones, mean P(clean), and how
    often the hottest cell of a damaged image lies on its damage or beside it (and how often any cell does), and the
    expected calibration error of P(damaged).
    """
    n = max(140, 1022 * SIZE**2 // source.side**2) if n is None else n
    pairs = source.pairs(n, split="heldout", seed=(seed,), transform=transform)
    visible = pairs.visible_B
    clean, _ = _look_at(net, pairs.clean_B3HW)
    damaged, heat_Bhw = _look_at(net, pairs.damaged_B3HW[visible])
    kinds = pairs.class_B[visible]
    scores = {"random looks": clean, **{name: _look_at(net, x)[0] for name, x in source.styled(n // 2, seed)}}

    def false_positives(recall: float) -> dict[str, float]:
        threshold = torch.quantile(damaged, 1 - recall)
        return {name: float((values >= threshold).float().mean()) for name, values in scores.items()}

    at_5 = torch.quantile(clean, 0.95)
    broken = torch.arange(len(clean) + len(damaged)) >= len(clean)
    hits, by_chance = _heat_hits(heat_Bhw, pairs.mask_BHW[visible])
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


def _per_class(measure: Callable[[Tensor], float], kinds: Tensor) -> dict[str, float]:
    """A measure of each class, by its name; of a class without visible damage there is none."""
    return {name: measure(kinds == k) for k, name in enumerate(CLASSES) if (kinds == k).any()}


def _heat_hits(heat_Bhw: Tensor, mask_BHW: Tensor) -> tuple[Tensor, float]:
    """Whether the hottest cell of each image lies within one cell of its mask, and the share of cells that do."""
    cells = _cells(mask_BHW, heat_Bhw)
    near = F.max_pool2d(cells, 3, stride=1, padding=1).flatten(1) > 0
    hottest = heat_Bhw.flatten(1).argmax(dim=1, keepdim=True)
    return near.gather(1, hottest)[:, 0], float(near.float().mean())


def _cells(mask_BHW: Tensor, heat: Tensor) -> Tensor:
    """Which cells of heat maps (..., h, w) a mask touches: float (B, 1, h, w)."""
    return F.adaptive_max_pool2d(mask_BHW[:, None].float(), heat.shape[-2:])


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
def _look_at(net: DefectNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """-log P(clean) of each image (B,), and the logit of its likeliest defect in each cell (B, h, w)."""
    heats = [net(part) for part in images.split(256)]
    return (torch.cat([-log_p_clean(net.pool(heat)) for heat in heats]),
            torch.cat([heat.amax(dim=1) for heat in heats]))


def _tensor(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


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
