"""Makes weights of the aesthetic reward: a Bradley-Terry head on a frozen backbone, from preference pairs."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_img.rewards.aesthetic_model import SMALL, AestheticHead, Features, open_features
from rlhf_img.rewards.preference import (
    Preference,
    Read,
    bradley_terry,
    fingerprint,
    fitted_scale,
    keep_settings,
    measured,
    part_of,
    write_card,
)
from rlhf_img.rewards.protocol import Images

_SHARD = 512
"""Pairs whose features are kept in one file, so that a stopped run goes on with the next."""

Show = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and its total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AestheticTraining:
    """How the head is trained."""

    steps: int = 600
    """Optimiser steps."""
    pairs: int = 128
    """Pairs a step."""
    lr: float = 1e-3
    """Learning rate of AdamW at the start; it falls linearly to 0."""
    weight_decay: float = 0.1
    hidden: int = 64
    """Width of the head's one hidden layer."""
    save_every: int = 200
    """Steps between checkpoints."""
    seed: int = 0


def train_aesthetic(
    out: Path, config: AestheticTraining, read: Read, *, backbone: str = SMALL, resume: bool = False,
    show: Show = lambda what, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Trains the head; writes `out` (safetensors) and its card (.json); returns the card.

    The same pairs and settings give the same weights on the same machine, whether interrupted and resumed or not.
    Features are computed once and kept in `out`.features until the end. Raises RlhfImgError for too few pairs, and if
    what is to be resumed is of other pairs or settings.
    """
    digest, sizes = fingerprint(read)
    folder = out.with_suffix(".features")
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    keep_settings(folder, {**asdict(config), "backbone": backbone, "pairs_of": digest})
    features = open_features(backbone)
    total = sum(sizes.values())
    shards = [load_file(f) for f in _features(features, read(), folder, lambda n: show("features", n, total))]
    chosen_PF, rejected_PF = (torch.cat([shard[side] for shard in shards]) for side in ("chosen", "rejected"))
    part_P = torch.cat([shard["part"] for shard in shards])
    train = part_P == 0
    head = _fit(chosen_PF[train], rejected_PF[train], config, folder / "head.pt", lambda n: show(
        "training", n, config.steps))  # fmt: skip
    with torch.inference_mode():
        margin_P = head(chosen_PF) - head(rejected_PF)
        centre = float(torch.cat([head(chosen_PF[train]), head(rejected_PF[train])]).mean())
    scale = fitted_scale(margin_P[part_P == 1])
    card = {
        "kind": "head", "backbone": backbone, "config": asdict(config), "pairs": sizes, "pairs_of": digest,
        "scale": scale, "centre": centre, "torch": torch.__version__,
        "heldout": measured(scale * margin_P[part_P == 2]), "train": measured(scale * margin_P[train]),
    }  # fmt: skip
    hidden = out.with_name(f".partial-{out.name}")
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, hidden)
    os.replace(hidden, out)
    write_card(out, card)
    shutil.rmtree(folder)
    return card


def _features(
    features: Features, pairs: Iterable[Preference], folder: Path, show: Callable[[int], None]
) -> Iterator[Path]:
    """Files with the features of both images of each pair, and the part it is of; those that are there stay."""
    waiting: list[Preference] = []
    done = 0

    def flush() -> Path:
        nonlocal done
        file = folder / f"{done // _SHARD:06d}.safetensors"
        if not file.exists():
            vectors = _vectors(features, [image for pair in waiting for image in pair.images()])
            parts = torch.tensor([("train", "val", "heldout").index(part_of(pair.prompt)) for pair in waiting])
            hidden = file.with_suffix(".part")
            save_file({"chosen": vectors[0::2].contiguous(), "rejected": vectors[1::2].contiguous(), "part": parts},
                      hidden)  # fmt: skip
            os.replace(hidden, file)
        done += len(waiting)
        waiting.clear()
        show(done)
        return file

    for pair in pairs:
        waiting.append(pair)
        if len(waiting) == _SHARD:
            yield flush()
    if waiting:
        yield flush()


def _vectors(features: Features, images: Sequence[Image.Image]) -> Tensor:
    """Of images that may differ in size, in order."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        by_size.setdefault(image.size, []).append(place)
    places = [place for found in by_size.values() for place in found]
    vectors = torch.cat([features(Images.from_pil([images[i] for i in found]).tensor) for found in by_size.values()])
    return vectors[torch.tensor(places).argsort()]


def _fit(
    chosen_PF: Tensor, rejected_PF: Tensor, config: AestheticTraining, checkpoint: Path, show: Callable[[int], None]
) -> AestheticHead:
    """The head after all steps, in eval mode. Each step's pairs and dropout depend on the seed and the step alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = AestheticHead(chosen_PF.shape[1], config.hidden)
    both = torch.cat([chosen_PF, rejected_PF])
    head.mean_F.copy_(both.mean(0))
    head.std_F.copy_(both.std(0).clamp_min(1e-6))
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / config.steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed * 1_000_003 + step)
            rows = torch.randint(len(chosen_PF), (config.pairs,))
            loss = bradley_terry(head(chosen_PF[rows]) - head(rejected_PF[rows])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % config.save_every == 0:
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
        show(step + 1)
    return head.eval()
