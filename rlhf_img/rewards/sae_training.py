"""Trains a sparse autoencoder on the embeddings that a detector has of pictures, clean, damaged and restyled."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.allow_list import LIST_FILE, SAE_FILE, embedding_of
from rlhf_img.rewards.artifact_model import DefectNet
from rlhf_img.rewards.artifact_pairs import PairSource
from rlhf_img.rewards.sae import SparseAutoencoder, cells_of, sae_loss


@dataclass(frozen=True, kw_only=True)
class SaeTraining:
    """How the autoencoder is trained.

    features: how many there are. k: of them active in a cell at most. steps: optimiser steps. pairs: twins a step, with
    the clean ones in another look besides. cells: embeddings a step. lr: of Adam, falling linearly to 0 over the last
    fifth. dead_after: steps without any activation after which a feature is dead. seed: of everything. save_every:
    steps between checkpoints.
    """

    features: int = 512
    k: int = 8
    steps: int = 1000
    pairs: int = 14
    cells: int = 4096
    lr: float = 1e-3
    dead_after: int = 50
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        """Raises ValueError for values that cannot work together."""
        if not 1 <= self.k < self.features:
            raise ValueError(f"k is at least 1 and below the number of features; given {self.k} and {self.features}")


def train_sae(
    folder: Path,
    config: SaeTraining,
    net: DefectNet,
    source: PairSource,
    *,
    resume: bool = False,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[SparseAutoencoder, list[dict[str, float]]]:
    """Trains on the embeddings that a net has of a source's pairs; writes the weights into `folder`.

    Returns the autoencoder and its curve (`step`, `loss`, `dead`). The same config gives the same weights on the same
    machine, whether interrupted or not. `progress`: the step and its loss. Raises RlhfImgError if the folder holds
    another training, or a finished one and `resume` is not given.
    """
    settings = {**asdict(config), "side": source.side, "pictures": source.fingerprint, "embedding": embedding_of(net)}
    checkpoint = folder / "sae.resume.pt"
    state = _state(folder, checkpoint, settings, resume)
    torch.manual_seed(config.seed)
    first = _cells(net, source, config, -1)
    sae = SparseAutoencoder(first.shape[1], config.features, config.k)
    sae.fit_scale(first)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr)
    start, curve, silent_F = 0, [], torch.zeros(config.features, dtype=torch.long)
    if state is not None:
        sae.load_state_dict(state["sae"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve, silent_F = state["step"], state["curve"], state["silent"]
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 5 * (1 - step / config.steps))
        loss, z = sae_loss(sae, _cells(net, source, config, step), silent_F >= config.dead_after)
        if not torch.isfinite(loss):
            raise RlhfImgError(f"sae training: the loss is {loss.item()} at step {step}; the embeddings are not finite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        sae.normalize()
        silent_F = torch.where((z > 0).any(dim=0), 0, silent_F + 1)
        progress(step + 1, float(loss.detach()))
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            dead = float((silent_F >= config.dead_after).float().mean())
            curve.append({"step": step + 1, "loss": float(loss.detach()), "dead": dead})
            _save(checkpoint, {"sae": sae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                               "silent": silent_F, "settings": settings, "curve": curve})
    hidden = folder / "sae.part"
    save_file({name: value.contiguous() for name, value in sae.state_dict().items()}, hidden)
    os.replace(hidden, folder / SAE_FILE)
    return sae.eval().requires_grad_(False), curve


def _state(folder: Path, checkpoint: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    if not checkpoint.is_file():
        if (folder / LIST_FILE).exists():
            raise RlhfImgError(f"{folder} holds a feature list, which may have been edited by hand; give another --out")
        return None
    if not resume:
        raise RlhfImgError(f"{folder} holds a training; go on with --resume, or give another --out")
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    before = state["settings"]
    if changed := [f"{key} was {before.get(key)}, is {value}" for key, value in settings.items()
                   if before.get(key) != value]:
        raise RlhfImgError(f"{folder} holds another training: {'; '.join(changed)}. Give the same, or another --out")
    return state


def _save(file: Path, state: dict[str, Any]) -> None:
    torch.save(state, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


@torch.no_grad()
def _cells(net: DefectNet, source: PairSource, config: SaeTraining, step: int) -> Tensor:
    """Embeddings (N, C) of a step: of clean, damaged and restyled images, cells at random."""
    pairs = source.pairs(config.pairs, split="train", seed=(config.seed, step + 1))
    x = cells_of(net, torch.cat([pairs.clean_B3HW, pairs.damaged_B3HW, pairs.restyled_B3HW]))[0]
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step + 1))
    return x[chosen[: config.cells]]
