"""From a config to a judge, and what the judges of this process did."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice

import numpy as np

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.canary import Canary
from rlhf_img.judges.fake import FakeJudge
from rlhf_img.judges.protocol import Judge, JudgeConfig, Usage

FAKE_URL = "fake:"

_usages: list[Usage] = []
"""The accounts of all judges that `open_judge` has opened."""


@lru_cache(maxsize=8)
def open_judge(config: JudgeConfig) -> Judge:
    """The judge of a config; the same one for the same config, so that its account and its canary go on.

    `url: "fake:"` gives one that answers by chance, to try a set-up out. Raises RlhfImgError if the judge cannot be
    opened.
    """
    judge = _open(config)
    _usages.append(judge.usage)
    return Canary(judge, every=config.canary_every) if config.canary_every else judge


_ALWAYS = {"judge/calls": "calls", "judge/failed": "failures", "judge/retries": "retries"}
_TOKENS = {"judge/prompt_tokens": "prompt_tokens", "judge/completion_tokens": "completion_tokens"}
COUNTS = (*_ALWAYS, *_TOKENS)
"""Those entries of `accounted` that are counts."""


@contextmanager
def accounted() -> Iterator[dict[str, float]]:
    """Gives a dictionary that holds, once the block is done, what all opened judges did in it; empty if nothing.

    judge/calls (questions and conversations), judge/failed (those without an answer), judge/retries, judge/seconds_mean
    and judge/seconds_p95 of a call, tokens where the server states them, and judge/drift and judge/flipped (see
    `Drift`) where canary questions were asked again.
    """
    before = {id(usage): copy.deepcopy(usage) for usage in _usages}
    found: dict[str, float] = {}
    yield found
    pairs = [(before.get(id(usage), Usage()), usage) for usage in _usages]
    found |= _metrics([(old, now) for old, now in pairs if now.calls > old.calls])


def _metrics(pairs: list[tuple[Usage, Usage]]) -> dict[str, float]:
    """From what each account was before and is now."""
    if not pairs:
        return {}

    def grown(name: str) -> float:
        return float(sum(getattr(now, name) - getattr(before, name) for before, now in pairs))

    found = {name: grown(attribute) for name, attribute in _ALWAYS.items()}
    # Newest first, as many as there were calls.
    seconds = [s for before, now in pairs for s in islice(reversed(now.latest), now.calls - before.calls)]
    found |= {"judge/seconds_mean": float(np.mean(seconds)), "judge/seconds_p95": float(np.percentile(seconds, 95))}
    tokens = {name: grown(attribute) for name, attribute in _TOKENS.items()}
    found |= {name: count for name, count in tokens.items() if count}
    for drift in (now.drift[-1] for before, now in pairs if len(now.drift) > len(before.drift)):
        # Of several judges the one that has changed most.
        found["judge/drift"] = max(drift.change, found.get("judge/drift", 0.0))
        found["judge/flipped"] = max(drift.flipped, found.get("judge/flipped", 0.0))
    return found


def _open(config: JudgeConfig) -> Judge:
    if config.url == FAKE_URL:
        return FakeJudge(max_failed=config.max_failed)
    if config.url is None:
        from rlhf_img.judges.local import LocalJudge

        return LocalJudge.load(config)
    try:
        from rlhf_img.judges.openai import OpenAIJudge
    except ModuleNotFoundError as error:
        missing = f"a judge server needs {error.name}, which is not installed"
        raise RlhfImgError(f"{missing}: pip install 'rlhf-img[judge]'") from error
    return OpenAIJudge(config)
