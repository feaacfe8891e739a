"""Makes the artifact reward's weights: clean renders in many looks against locally damaged twins in the same look."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from rlhf_img.rewards.defects import CLASSES, inject, object_masks

CleanTransform = Callable[[Tensor], Tensor]
"""Leaves a clean image clean, such as a VAE's reconstruction: (B, 3, H, W) in [0, 1] to the same."""

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
    x, y = _tensor(clean), _tensor(damaged)
    if transform is not None:
        half = torch.arange(n) % 2 == 0
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
    """Loss of each image: -log P(clean) or -log P(damaged), plus the cross-entropies per class and per cell."""
    log_clean = log_p_clean(logits_BK)
    # log(1 - e^x) loses its digits near x = 0 unless written with expm1.
    log_damaged = torch.log(-torch.expm1(log_clean.clamp(max=-1e-6)))
    image = -torch.where(damaged_B, log_damaged, log_clean)
    per_class = F.binary_cross_entropy_with_logits(logits_BK, target_BKhw.amax(dim=(2, 3)), reduction="none").sum(1)
    per_cell = F.binary_cross_entropy_with_logits(heat_BKhw, target_BKhw, reduction="none").mean(dim=(2, 3)).sum(1)
    return image + per_class + heat_weight * per_cell


def train_artifact(
    out: Path,
    config: ArtifactTraining,
    *,
    resume: bool = False,
    clean_transform: CleanTransform | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Trains the detector; writes `out` (safetensors) and its card (.json); returns the card.

    The same config gives the same weights on the same machine, whether interrupted and resumed or not: each step's
    batch depends on the seed and the step only. `progress` is called with the step and its loss.
    """
    checkpoint = out.with_suffix(".resume.pt")
    torch.manual_seed(config.seed)
    net = DefectNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    start = _restore(checkpoint, config, net, optimizer) if resume else 0
    out.parent.mkdir(parents=True, exist_ok=True)
    net.train()
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(step, config.steps)
        loss = _step(net, optimizer, config, step, clean_transform)
        progress(step + 1, loss)
        if (step + 1) % config.save_every == 0:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                     "config": asdict(config)}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    card = {"classes": list(CLASSES), "side": SIZE, "config": asdict(config),
            "vae_reconstructions": clean_transform is not None, "torch": torch.__version__,
            "heldout": evaluate(net.eval(), transform=clean_transform)}
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out)
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return card


def _step(
    net: DefectNet,
    optimizer: torch.optim.Optimizer,
    config: ArtifactTraining,
    step: int,
    transform: CleanTransform | None,
) -> float:
    pairs = make_pairs(config.pairs, split="train", seed=(config.seed, step), transform=transform)
    images = torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW])
    damaged = torch.arange(len(images)) >= config.pairs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heat = net(images)
    heat = heat.float()
    cells = F.max_pool2d(pairs.mask_BHW[:, None].float(), images.shape[-1] // heat.shape[-1])
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
    net: DefectNet, *, n: int = 1022, seed: int = 10_000, transform: CleanTransform | None = None
) -> dict[str, Any]:
    """How well the detector tells clean from damaged on unseen compositions and seeds.

    Returns AUC over all and per class, P(clean) of clean, styled and damaged images, and the share of clean images of
    each style taken for damaged at the threshold that finds 90 % of the damaged ones.
    """
    pairs = make_pairs(n, split="heldout", seed=(seed,), transform=transform)
    visible = pairs.visible_B
    clean, damaged = _defect_score(net, pairs.clean_B3HW), _defect_score(net, pairs.damaged_B3HW[visible])
    kinds = pairs.class_B[visible]
    threshold = torch.quantile(damaged, 0.1)
    styled = {style: _defect_score(net, _styled(style, n // 2, seed)) for style in (*STYLES, "no style")}
    return {
        "images": {"clean": n, "damaged": len(damaged), "styled": n // 2},
        "auc": auc(damaged, clean),
        "auc_per_class": {name: auc(damaged[kinds == k], clean) for k, name in enumerate(CLASSES)},
        "false_positives_at_90_recall": {
            "random looks": float((clean >= threshold).float().mean()),
            **{style: float((scores >= threshold).float().mean()) for style, scores in styled.items()},
        },
        "mean_reward": {"clean": float(torch.exp(-clean).mean()), "damaged": float(torch.exp(-damaged).mean()),
                        **{style: float(torch.exp(-scores).mean()) for style, scores in styled.items()}},
    }


def auc(positive_N: Float[Tensor, " N"], negative_M: Float[Tensor, " M"]) -> float:
    """Probability that a positive scores above a negative, ties counted half; 0.5 is chance.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    order = torch.searchsorted(negative_M.sort().values, torch.stack([positive_N, positive_N]),
                               right=False).double()
    above = torch.searchsorted(negative_M.sort().values, positive_N, right=True).double()
    return float((order[0] + above).mean() / (2 * len(negative_M)))


def _defect_score(net: DefectNet, images: Tensor) -> Tensor:
    """-log P(clean) of each image."""
    return torch.cat([-log_p_clean(net.pool(net(part))) for part in images.split(256)])


def _styled(style: str, n: int, seed: int) -> Tensor:
    """Clean renders in one of the playground's own styles, of unseen compositions."""
    rng = np.random.default_rng((seed, 1))
    chosen = None if style == "no style" else style
    return _tensor([render(replace(sample_scene(rng, "heldout"), style=chosen), seed=i) for i in range(n)])


def _tensor(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _restore(path: Path, config: ArtifactTraining, net: DefectNet, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from; 0 if there is no checkpoint. Raises RlhfImgError if it is of another config."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["config"] != asdict(config):
        raise RlhfImgError(
            f"artifact training: the checkpoint {path} was made with {state['config']}, this run asks for "
            f"{asdict(config)}. Give the same settings, or start anew without --resume."
        )
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
