"""Calling rewards: on a whole batch, or on images as they are drawn, so that those who wait for others begin early."""

import asyncio
import inspect
import math
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.rewards.protocol import Images, Reward, Scores, Verdict


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images: Images,
    columns: Mapping[str, Sequence[object]] | None = None,
    *,
    group_size: int | None = None,
    max_unscored: float = 0.5,
) -> Scores:
    """Scores a batch with every reward: sync ones one after the other, those that wait meanwhile.

    prompts: B strings. columns: named lists of B entries, handed to every reward. group_size: images of one prompt lie
    next to each other in runs of this length; rewards that want groups get one run at a time (None: all B are one).

    A reward that raises leaves its images unscored, as do None, NaN, infinite and out-of-range values: unscored is
    never 0. If more than the share `max_unscored` of a batch is unscored by one reward, the run is stopped.

    Raises RlhfImgError if a reward returns the wrong number of values or something that is no number, or if lengths do
    not match; RunStopped if a reward fails too often.
    """
    with Scoring(rewards, len(images), prompts, columns, group_size=group_size) as scoring:
        scoring.add(range(len(images)), images)
        return scoring.result(max_unscored=max_unscored)


class Scoring:
    """Scores B images that come in parts, while they are drawn.

    Rewards that wait for others (async ones and those with `waits`) are asked about each part as it comes, in threads
    of their own; the rest about all images at once, in the end, by who asks for the result. An image's place among the
    B is told with it: in which order parts come, and answers to them, changes nothing.

    A context manager: leaving it gives up what is still in flight. Arguments and errors as of `score`.
    """

    def __init__(
        self, rewards: Sequence[Reward], count: int, prompts: Sequence[str],
        columns: Mapping[str, Sequence[object]] | None = None, *, group_size: int | None = None,
    ) -> None:  # fmt: skip
        self._rewards, self._count, self._group = rewards, count, group_size or count
        self._columns = {"prompts": prompts, **(columns or {})}
        _check_batch(rewards, count, prompts, columns or {}, group_size)
        self._drawn: list[tuple[Sequence[int], Images]] = []
        self._asked: list[tuple[Reward, Future[_Answer]]] = []
        self._loop: _Loop | None = None
        # One thread: functions that are not async need not bear being called twice at a time.
        self._line = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_: object) -> None:
        self._line.shutdown(wait=False, cancel_futures=True)
        if self._loop is not None:
            self._loop.close()

    def add(self, rows: Sequence[int], images: Images) -> None:
        """Images with their places among the B; a group's lie next to each other and come together."""
        self._drawn.append((rows, images))
        for reward in self._rewards:
            if _is_async(reward):
                self._loop = self._loop or _Loop()
                self._asked.append((reward, self._loop.submit(self._call(reward, rows, images).run_async())))
            elif reward.waits:
                self._asked.append((reward, self._line.submit(self._call(reward, rows, images).run)))

    @cached_property
    def images(self) -> Images:
        """All B images in their order; to be asked for when the last has come."""
        rows = [row for rows, _ in self._drawn for row in rows]
        assert sorted(rows) == list(range(self._count)), "each image comes once"
        if len(self._drawn) == 1 and rows == sorted(rows):
            return self._drawn[0][1]
        return Images(torch.cat([images.tensor for _, images in self._drawn])[torch.tensor(rows).argsort()])

    def result(self, *, max_unscored: float = 0.5) -> Scores:
        """What the rewards say of the B images. Waits for those that are still being asked."""
        answers = self._finish()
        found = self._placed(answers)
        values = [[math.nan if v.value is None else v.value for v in verdicts] for verdicts in found.values()]
        scores = Scores(
            names=tuple(found),
            values_BK=torch.tensor(values, dtype=torch.float32).reshape(len(found), -1).T,
            details={name: tuple(v.details for v in verdicts) for name, verdicts in found.items()},
            unscored={name: dict(Counter(v.reason for v in verdicts if v.reason is not None))
                      for name, verdicts in found.items()},
            seconds={name: max(a.ended for a in of) - min(a.began for a in of) for name, of in answers.items()},
        )  # fmt: skip
        _stop_if_blind(scores, max_unscored)
        return scores

    def verdicts(self) -> dict[str, list[Verdict]]:
        """By reward, what it says of each of the B images, checked against its range; instead of `result`."""
        return self._placed(self._finish())

    def _placed(self, answers: "Mapping[str, Sequence[_Answer]]") -> dict[str, list[Verdict]]:
        found = {}
        for name, of in answers.items():
            placed = {row: verdict for a in of for row, verdict in zip(a.rows, a.verdicts, strict=True)}
            found[name] = [placed[row] for row in range(self._count)]
        return found

    def _finish(self) -> "dict[str, list[_Answer]]":
        """Asks those that do not wait for others, and waits for those that do."""
        images = self.images
        answers: dict[str, list[_Answer]] = {reward.name: [] for reward in self._rewards}
        for reward in self._rewards:
            if not (reward.waits or _is_async(reward)):
                answers[reward.name].append(self._call(reward, range(self._count), images).run())
        done, _ = wait([future for _, future in self._asked], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # an error ends the others too
        for reward, future in self._asked:
            answers[reward.name].append(future.result())
        return answers

    def _call(self, reward: Reward, rows: Sequence[int], images: Images) -> "_Call":
        columns = {name: [values[row] for row in rows] for name, values in self._columns.items()}
        return _Call(reward, rows, images, columns, self._group if reward.group else len(rows))


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a reward said of the images at `rows`, and when, on the clock of `time.perf_counter`."""

    rows: Sequence[int]
    verdicts: list[Verdict]
    began: float
    ended: float


class _Call:
    """One reward's work on images, `length` at a time."""

    def __init__(
        self, reward: Reward, rows: Sequence[int], images: Images, columns: Mapping[str, Sequence[object]], length: int
    ) -> None:
        self.reward, self.rows = reward, rows
        self.parts: list[dict[str, Any]] = []
        for start in range(0, len(images), max(1, length)):
            part = slice(start, start + length)
            named = {name: values[part] for name, values in columns.items()}
            self.parts.append({"images": images if length >= len(images) else images[part], **named})

    def run(self) -> _Answer:
        began, verdicts = time.perf_counter(), []
        for part in self.parts:
            try:
                verdicts += self._checked(self.reward.fn(**part), part)
            except RlhfImgError:
                raise
            except Exception as error:  # a plug-in may raise anything, and its batch is unscored, not lost
                verdicts += _raised(error, part)
        return _Answer(rows=self.rows, verdicts=verdicts, began=began, ended=time.perf_counter())

    async def run_async(self) -> _Answer:
        began, verdicts = time.perf_counter(), []
        for part in self.parts:
            try:
                verdicts += self._checked(await self.reward.fn(**part), part)  # type: ignore[misc]
            except RlhfImgError:
                raise
            except Exception as error:  # as above
                verdicts += _raised(error, part)
        return _Answer(rows=self.rows, verdicts=verdicts, began=began, ended=time.perf_counter())

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


class _Loop:
    """An event loop in a thread of its own: the caller's may run one already, and blocks it while it works."""

    def __init__(self) -> None:
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = Thread(target=asyncio.run, args=(self._live(),), name="async rewards", daemon=True)
        self._thread.start()
        self._loop, self._over = self._ready.result()

    async def _live(self) -> None:
        over = asyncio.Event()
        self._ready.set_result((asyncio.get_running_loop(), over))
        await over.wait()

    def submit(self, work: Coroutine[Any, Any, _Answer]) -> Future[_Answer]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancels what has not ended, and waits for that."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()


def _is_async(reward: Reward) -> bool:
    return inspect.iscoroutinefunction(reward.fn) or inspect.iscoroutinefunction(type(reward.fn).__call__)


def _raised(error: Exception, part: dict[str, Any]) -> list[Verdict]:
    return [Verdict(value=None, reason=f"raised {type(error).__name__}: {error}")] * len(part["prompts"])


def _check_batch(
    rewards: Sequence[Reward],
    count: int,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[object]],
    group_size: int | None,
) -> None:
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != count:
            raise RlhfImgError(f"{count} images, but {len(values)} entries of {name}; give one for each image")
    if clash := {"prompts", "images"} & set(columns):
        raise RlhfImgError(f"no column may be called {', '.join(sorted(clash))}: rewards get these anyway; rename it")
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RlhfImgError(f"two rewards are called {', '.join(twice)}; give one of them another name")
    if group_size is not None and (group_size < 1 or count % group_size):
        raise RlhfImgError(f"{count} images do not divide into groups of {group_size}")


def _stop_if_blind(scores: Scores, max_unscored: float) -> None:
    for name, reasons in scores.unscored.items():
        missing, total = sum(reasons.values()), len(scores.values_BK)
        if total and missing / total > max_unscored:
            listed = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))
            raise RunStopped(
                f"reward {name} left {missing} of {total} images unscored, more than the {max_unscored:.0%} that a run "
                f"bears: {listed}. Mend the reward (or its judge), then go on with --resume"
            )
