"""Clean images beside locally damaged twins in the same look: what the artifact reward learns from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_img.playground.render import render
from rlhf_img.playground.scene import SIZE, STYLES, Scene, Split, sample_scene
from rlhf_img.rewards.appearance import Look, random_look
from rlhf_img.rewards.defects import CLASSES, inject, parts_of

CleanTransform = Callable[[Tensor], Tensor]
"""Leaves a clean image clean, such as a VAE's reconstruction: (B, 3, H, W) in [0, 1] to the same."""

_VISIBLE_PX = 16
"""A defect that changes fewer pixels clearly, after the look, is not taught: its label would be noise."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Clean images and their damaged twins, in [0, 1]; which class, where, and whether the damage is visible.

    restyled_B3HW: the clean ones in another look. appearance_BA: of the twins' look, see `Look.appearance`.
    """

    clean_B3HW: Tensor
    damaged_B3HW: Tensor
    restyled_B3HW: Tensor
    appearance_BA: Tensor
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


PLAYGROUND = Playground()


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
        broken = inject(CLASSES[k], image, parts_of(scene, CLASSES[k]), rng)
        if broken is None:
            continue
        clean.append(image)
        damaged.append(broken)
        classes.append(k)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    first, second = (random_look(n, SIZE, generator) for _ in range(2))
    return twins(clean, damaged, classes, (look or first, second), transform)


def twins(
    clean: list[np.ndarray], damaged: list[np.ndarray], classes: list[int], looks: tuple[Look, Look],
    transform: CleanTransform | None,
) -> Pairs:  # fmt: skip
    """Images uint8 (H, W, 3) and their damaged twins as pairs: both in the first look, and masked where they differ."""
    x, y = _tensor(clean), _tensor(damaged)
    if transform is not None:
        half = torch.arange(len(x)) % 2 == 0
        with torch.no_grad():
            x[half], y[half] = transform(x[half]).clamp(0, 1), transform(y[half]).clamp(0, 1)
    look, other = looks
    restyled, x, y = other(x), look(x), look(y)
    noise_B = look.grain_B if look.color_noise_B is None else look.grain_B + look.color_noise_B
    mask = (x - y).abs().amax(dim=1) > (0.12 + 1.5 * noise_B)[:, None, None]
    return Pairs(clean_B3HW=x, damaged_B3HW=y, restyled_B3HW=restyled, appearance_BA=look.appearance(),
                 class_B=torch.tensor(classes), mask_BHW=mask, visible_B=mask.sum(dim=(1, 2)) >= _VISIBLE_PX)


def cells_touched(mask_BHW: Tensor, heat: Tensor) -> Tensor:
    """Which cells of heat maps (..., h, w) a mask touches: float (B, 1, h, w)."""
    return F.adaptive_max_pool2d(mask_BHW[:, None].float(), heat.shape[-2:])


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


def _tensor(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
