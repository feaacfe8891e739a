"""What a reward is, how one is called, and what comes back: values, and the reasons where there are none."""

import asyncio
import inspect
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_img.errors import RlhfImgError, RunStopped


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
    group: True if it wants the images of one prompt at once, and no others. weight: of an objective. floor: the
    standard deviation, in the reward's own units, below which differences are taken for noise. below, cap: of a gate;
    where its value is below `below`, every objective is at most at the fraction `cap` of its range.
    source: where it comes from. needs: what weights it loads.
    """

    name: str
    fn: RewardFunction
    range: tuple[float, float] = (0.0, 1.0)
    role: Literal["objective", "gate", "both", "measure"] = "objective"
    group: bool = False
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


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One reward's part of `Scores`."""

    values: list[float]
    details: tuple[object, ...]
    unscored: Counter[str]
    seconds: float


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images: Images,
    columns: Mapping[str, Sequence[object]] | None = None,
    *,
    group_size: int | None = None,
    max_unscored: float = 0.5,
) -> Scores:
    """Scores a batch with every reward: sync ones one after the other, async ones meanwhile.

    prompts: B strings. columns: named lists of B entries, handed to every reward. group_size: images of one prompt lie
    next to each other in runs of this length; rewards that want groups get one run at a time (None: all B are one).

    A reward that raises leaves its images unscored, as do None, NaN, infinite and out-of-range values: unscored is
    never 0. If more than the share `max_unscored` of a batch is unscored by one reward, the run is stopped.

    Raises RlhfImgError if a reward returns the wrong number of values or something that is no number, or if lengths do
    not match; RunStopped if a reward fails too often.
    """
    columns = dict(columns or {})
    _check_batch(rewards, prompts, images, columns, group_size)
    calls = [_Call(r, prompts, images, columns, (group_size or len(images)) if r.group else None) for r in rewards]
    waiting = [call for call in calls if call.is_async]
    with ThreadPoolExecutor(max_workers=1) as pool:
        # A thread of its own: the caller may already run an event loop, and sync rewards would block this one.
        gathered = pool.submit(asyncio.run, _gather(waiting)) if waiting else None
        done = {call.reward.name: call.run() for call in calls if not call.is_async}
        if gathered is not None:
            done |= {call.reward.name: column for call, column in zip(waiting, gathered.result(), strict=True)}
    scored = [done[reward.name] for reward in rewards]
    scores = Scores(
        names=tuple(reward.name for reward in rewards),
        values_BK=torch.tensor([column.values for column in scored], dtype=torch.float32).reshape(len(rewards), -1).T,
        details={r.name: column.details for r, column in zip(rewards, scored, strict=True)},
        unscored={r.name: dict(column.unscored) for r, column in zip(rewards, scored, strict=True)},
        seconds={r.name: column.seconds for r, column in zip(rewards, scored, strict=True)},
    )
    _stop_if_blind(scores, max_unscored)
    return scores


class _Call:
    """One reward's work on one batch."""

    def __init__(
        self,
        reward: Reward,
        prompts: Sequence[str],
        images: Images,
        columns: Mapping[str, Sequence[object]],
        run_length: int | None,
    ) -> None:
        self.reward = reward
        step = run_length or max(1, len(images))
        self.parts: list[dict[str, Any]] = []
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            whole = step >= len(images)
            named = {name: values[part] for name, values in columns.items()}
            self.parts.append({"prompts": list(prompts[part]), "images": images if whole else images[part], **named})

    @property
    def is_async(self) -> bool:
        fn = self.reward.fn
        return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)

    def run(self) -> _Column:
        began = time.perf_counter()
        outcomes = []
        for part in self.parts:
            try:
                outcomes.append(self._checked(self.reward.fn(**part), part))
            except RlhfImgError:
                raise
            except Exception as error:  # a plug-in may raise anything, and its batch is unscored, not lost
                outcomes.append(_raised(error, part))
        return self._column(outcomes, time.perf_counter() - began)

    async def run_async(self) -> _Column:
        began = time.perf_counter()
        outcomes = []
        for part in self.parts:
            try:
                outcomes.append(self._checked(await self.reward.fn(**part), part))  # type: ignore[misc]
            except RlhfImgError:
                raise
            except Exception as error:  # as above
                outcomes.append(_raised(error, part))
        return self._column(outcomes, time.perf_counter() - began)

    def _checked(self, returned: object, part: dict[str, Any]) -> list[Verdict]:
        given = returned.tolist() if isinstance(returned, Tensor | np.ndarray) else returned
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(part["prompts"]):
            what = f"{len(given)} values" if isinstance(given, list | tuple) else f"a {type(returned).__name__}"
            raise RlhfImgError(
                f"reward {self.reward.name} returned {what} for {len(part['prompts'])} images; "
                f"it must return a list with one number or None for each image"
            )
        return [self._verdict(value) for value in given]

    def _verdict(self, value: object) -> Verdict:
        """What was returned for one image, checked against the declared range."""
        details = value.details if isinstance(value, Verdict) else None
        given = value.value if isinstance(value, Verdict) else value
        if given is None:
            reason = value.reason if isinstance(value, Verdict) else None
            return Verdict(value=None, reason=reason or "no score given", details=details)
        try:
            number = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise RlhfImgError(
                f"reward {self.reward.name} returned {given!r}; each value must be a number, None or a Verdict"
            ) from None
        low, high = self.reward.range
        if not math.isfinite(number):
            return Verdict(value=None, reason=f"not a finite number: {number}", details=details)
        # Sums of float32 may pass a bound by their rounding error.
        slack = 1e-6 * (high - low) if math.isfinite(high - low) else 0.0
        if not low - slack <= number <= high + slack:
            return Verdict(value=None, reason=f"out of its declared range [{low:g}, {high:g}]", details=details)
        return Verdict(value=min(max(number, low), high), details=details)

    def _column(self, outcomes: Sequence[Sequence[Verdict]], seconds: float) -> _Column:
        verdicts = [verdict for outcome in outcomes for verdict in outcome]
        return _Column(
            values=[math.nan if v.value is None else v.value for v in verdicts],
            details=tuple(v.details for v in verdicts),
            unscored=Counter(v.reason for v in verdicts if v.reason is not None),
            seconds=seconds,
        )


async def _gather(calls: Sequence[_Call]) -> list[_Column]:
    return await asyncio.gather(*(call.run_async() for call in calls))


def _raised(error: Exception, part: dict[str, Any]) -> list[Verdict]:
    return [Verdict(value=None, reason=f"raised {type(error).__name__}: {error}")] * len(part["prompts"])


def _check_batch(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images: Images,
    columns: Mapping[str, Sequence[object]],
    group_size: int | None,
) -> None:
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(images):
            raise RlhfImgError(f"{len(images)} images, but {len(values)} entries of {name}; give one for each image")
    if clash := {"prompts", "images"} & set(columns):
        raise RlhfImgError(f"no column may be called {', '.join(sorted(clash))}: rewards get these anyway; rename it")
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RlhfImgError(f"two rewards are called {', '.join(twice)}; give one of them another name")
    if group_size is not None and (group_size < 1 or len(images) % group_size):
        raise RlhfImgError(f"{len(images)} images do not divide into groups of {group_size}")


def _stop_if_blind(scores: Scores, max_unscored: float) -> None:
    for name, reasons in scores.unscored.items():
        missing, total = sum(reasons.values()), len(scores.values_BK)
        if total and missing / total > max_unscored:
            listed = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))
            raise RunStopped(
                f"reward {name} left {missing} of {total} images unscored, more than the {max_unscored:.0%} that a run "
                f"bears: {listed}. Mend the reward (or its judge), then go on with --resume"
            )
