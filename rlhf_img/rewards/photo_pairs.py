"""Matched pairs from a user's own pictures: crops, damaged twins, and looks that both of them share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.scene import Split
from rlhf_img.rewards.appearance import in_every_style, photo_look
from rlhf_img.rewards.artifact_pairs import CleanTransform, Pairs, twins
from rlhf_img.rewards.defects import CLASSES, inject
from rlhf_img.rewards.folder_images import Folder
from rlhf_img.rewards.photo_defects import INJECTORS, prepared

_PATIENCE = 50
"""Crops tried for one pair before giving up: some crops are nothing but sky."""


def check_side(side: int) -> None:
    """Raises RlhfImgError unless a network can be trained at this side: heat maps must tile the image."""
    if side % 8 or not 32 <= side <= 1024:
        raise RlhfImgError(f"--side {side}: give a multiple of 8 from 32 to 1024, the side of the images to judge")


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Pairs made of a folder's pictures. Every fourth picture, at most 500, is held out with all of its crops.

    side: of the crops in pixels, a multiple of 8 from 32 to 1024. A crop shows between all of a picture's short side
    and as little as there is detail for.
    """

    folder: Folder
    side: int

    @property
    def heldout(self) -> tuple[Image.Image, ...]:
        """The pictures that are only measured on."""
        return self.folder.pictures[: min(500, max(1, len(self.folder.pictures) // 4))]

    @property
    def train(self) -> tuple[Image.Image, ...]:
        """The pictures that are learnt from."""
        return self.folder.pictures[len(self.heldout) :]

    @property
    def fingerprint(self) -> str:
        """Of the files' names and pixels."""
        return self.folder.fingerprint

    def pairs(self, n: int, *, split: Split, seed: tuple[int, ...], transform: CleanTransform | None = None) -> Pairs:
        """n matched pairs, the same for the same seed; `transform` as in `make_pairs`.

        Raises RlhfImgError if the pictures have hardly a crop in which a defect can be seen.
        """
        rng = np.random.default_rng(seed)
        clean: list[np.ndarray] = []
        damaged: list[np.ndarray] = []
        tries = 0
        while len(clean) < n:
            tries += 1
            if tries > _PATIENCE * n:
                raise RlhfImgError("no defect shows in these pictures: are they empty or very dark? Give photographs")
            name = CLASSES[len(clean) % len(CLASSES)]
            image, parts = prepared(name, self._crop(split, rng), rng)
            broken = inject(name, image, parts, rng, injectors=INJECTORS)
            if broken is not None:
                clean.append(image)
                damaged.append(broken)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        first, second = (photo_look(n, self.side, generator) for _ in range(2))
        return twins(clean, damaged, [k % len(CLASSES) for k in range(n)], (first, second), transform)

    def styled(self, n: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Clean crops of held-out pictures as they are, and in each style at three strengths."""
        rng = np.random.default_rng((seed, 1))
        crops = np.stack([self._crop("heldout", rng) for _ in range(n)])
        plain = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
        yield from in_every_style(plain, seed)

    def card(self) -> dict[str, Any]:
        """What the weights were made of: counts, the held-out files, conversions, and what was skipped and why."""
        skipped = {reason: {"count": len(names), "files": sorted(names)[:5]}
                   for reason, names in self.folder.skipped.items()}
        return {
            "used": len(self.folder.names), "learnt from": len(self.train), "held out": len(self.heldout),
            "held-out files": list(self.folder.names[: len(self.heldout)]),
            "read as": {kind: len(names) for kind, names in self.folder.read_as.items()},
            "skipped": skipped, "fingerprint": self.fingerprint,
        }

    def _crop(self, split: Split, rng: np.random.Generator) -> np.ndarray:
        """A square of a random picture, of random size and place, perhaps mirrored: uint8 (side, side, 3)."""
        pictures = self.train if split == "train" else self.heldout
        picture = pictures[rng.integers(len(pictures))]
        size = rng.uniform(self.side, min(picture.size))
        left, top = rng.uniform(0, picture.width - size), rng.uniform(0, picture.height - size)
        box = (left, top, left + size, top + size)
        crop = picture.resize((self.side, self.side), Image.Resampling.LANCZOS, box=box)
        return np.array(ImageOps.mirror(crop) if rng.random() < 0.5 else crop)
