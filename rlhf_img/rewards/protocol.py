"""What a reward is, what it gets, and what comes back: values, and the reasons where there are none."""

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_img.errors import RlhfImgError


class Images(Sequence[Image.Image]):
    """A batch of images, converted once, and only into the forms that a reward asks for.

    It iterates and indexes as PIL images (RGB, 8 bits); a slice is again an `Images`. `tensor` is the batch itself,
    `arrays` its 8-bit form.
    """

    def __init__(self, tensor: Tensor) -> None:
        """`tensor`: float RGB in [0, 1], (B, 3, H, W). Raises RlhfImgError for any other shape, type or range."""
        if tensor.ndim != 4 or tensor.shape[1] != 3 or not tensor.is_floating_point():
            raise RlhfImgError(
                f"images are a float tensor (B, 3, H, W), RGB in [0, 1]; given {tensor.dtype} {tuple(tensor.shape)}"
            )
        tensor = tensor.detach()
        if tensor.numel() and not (tensor.amin() >= 0 and tensor.amax() <= 1):
            raise RlhfImgError(
                f"images are in [0, 1]; given values from {tensor.amin().item():.3g} to {tensor.amax().item():.3g}. "
                f"Clamp them after decoding; if they are not finite, the model has diverged"
            )
        self.tensor = tensor
        self._pil: dict[int, Image.Image] = {}

    @classmethod
    def from_pil(cls, images: Sequence[Image.Image]) -> "Images":
        """From PIL images of one size. Raises RlhfImgError if sizes differ."""
        if len(sizes := {image.size for image in images}) != 1:
            raise RlhfImgError(f"a batch holds images of one size; given {sorted(sizes) or 'no image'}")
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return cls(torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255)

    @cached_property
    def arrays(self) -> np.ndarray:
        """uint8 (B, H, W, 3), rounded to the nearest level."""
        rounded = self.tensor.float().mul(255).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def __len__(self) -> int:
        return len(self.tensor)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | Images":
        if isinstance(index, slice):
            return Images(self.tensor[index])
        place = range(len(self))[index]
        if place not in self._pil:
            self._pil[place] = Image.fromarray(self.arrays[place])
        return self._pil[place]

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a reward may return instead of a bare number, when it has more to say.

    value: the score, or None for unscored. reason: why it is unscored. details: anything a report may want to show.
    """

    value: float | None
    reason: str | None = None
    details: object = None


Value = float | Verdict | None
RewardFunction = Callable[..., Sequence[Value] | Awaitable[Sequence[Value]]]
"""Called as `fn(prompts=..., images=..., **columns)`; one value for each image. TRL's convention."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward and how it takes part.

    name: what it is called in specs, metrics and reports. fn: the callable; see `RewardFunction`. range: its lowest and
    highest value; higher is better. role: an "objective" is normalised and summed, a "gate" caps the objectives, "both"
    does both (its slope is then the way back through its own gate, which does not cap it), and a "measure" takes no
    part in training: it belongs into `eval.rewards`.
    group: True if it wants the images of one prompt at once, and no others. waits: True if it mostly waits for another
    machine, as async functions do anyway: it is then asked while further images are drawn. weight: of an objective.
    floor: the standard deviation, in the reward's own units, below which differences are taken for noise. below, cap:
    of a gate; where its value is below `below`, every objective is at most at the fraction `cap` of its range.
    source: where it comes from. needs: what weights it loads.
    """

    name: str
    fn: RewardFunction
    range: tuple[float, float] = (0.0, 1.0)
    role: Literal["objective", "gate", "both", "measure"] = "objective"
    group: bool = False
    waits: bool = False
    weight: float = 1.0
    floor: float = 0.02
    below: float = 0.5
    cap: float = 0.2
    source: str = "python"
    needs: str = "none to fetch"

    def __post_init__(self) -> None:
        low, high = self.range
        if not low < high:
            raise RlhfImgError(f"reward {self.name}: range is (lowest, highest); given {self.range}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise RlhfImgError(f"reward {self.name}: weight is a number of at least 0; given {self.weight}")
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise RlhfImgError(
                f"reward {self.name}: floor is a standard deviation in its own units, above 0; given {self.floor}"
            )
        if not 0 <= self.cap <= 1:
            raise RlhfImgError(f"reward {self.name}: cap is a fraction of the range, in [0, 1]; given {self.cap}")

    @property
    def is_objective(self) -> bool:
        """Whether its normalised values are summed."""
        return self.role in ("objective", "both")

    @property
    def is_gate(self) -> bool:
        """Whether it caps objectives."""
        return self.role in ("gate", "both")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the rewards said of a batch. K follows `names`.

    values_BK: float32, NaN where unscored. details: what each reward adds for reports, one entry an image.
    unscored: for each reward, how many images went unscored for which reason. seconds: wall-clock time of each.
    """

    names: tuple[str, ...]
    values_BK: Tensor
    details: Mapping[str, tuple[object, ...]]
    unscored: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
