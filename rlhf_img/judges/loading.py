"""From a config to a judge, and what the judges of this process did."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.canary import Baseline, Canary
from rlhf_img.judges.fake import FakeJudge
from rlhf_img.judges.protocol import Ask, Judge, JudgeConfig, Usage

FAKE_URL = "fake:"

_usages: list[Usage] = []
"""The accounts of all judges that `open_judge` has opened."""
_canaries: dict[str, Canary] = {}
"""Their canaries, by the judges' ids."""
_baselines: dict[str, Baseline] = {}
"""Those that `load_canaries` read and that no judge has taken yet."""


@lru_cache(maxsize=8)
def open_judge(config: JudgeConfig) -> Judge:
    """The judge of a config; the same one for the same config, so that its account and its canary go on.

    `url: "fake:"` gives one that answers by chance, to try a set-up out. Raises RlhfImgError if the judge cannot be
    opened.
    """
    judge = _open(config)
    _usages.append(judge.usage)
    if not config.canary_every:
        return judge
    _canaries[judge.id] = canary = Canary(judge, every=config.canary_every)
    if judge.id in _baselines:
        canary.restore(_baselines.pop(judge.id))
    return canary


def save_canaries(file: Path) -> None:
    """Writes what the canaries of the opened judges compare with (safetensors); nothing where there is none."""
    baselines = {name: canary.baseline for name, canary in _canaries.items() if canary.baseline.kept} | _baselines
    if not baselines:
        return
    told = {
        name: {"since": b.since, "kept": [{"question": ask.question, "p_yes": p} for ask, p in b.kept]}
        for name, b in baselines.items()
    }
    images = {f"{name}/{i}": ask.image for name, b in baselines.items() for i, (ask, _) in enumerate(b.kept)}
    save_file(images, file, metadata={"baselines": json.dumps(told)})


def load_canaries(file: Path) -> None:
    """Gives the canaries, now or once their judges are opened, what they compared with when `save_canaries` wrote it.

    Without the file they start anew. Raises RlhfImgError if it is damaged.
    """
    if not file.exists():
        return
    try:
        with safe_open(file, framework="numpy") as stored:
            told = json.loads(stored.metadata()["baselines"])
            for name, b in told.items():
                kept = tuple(
                    (Ask(image=stored.get_tensor(f"{name}/{i}"), question=row["question"]), float(row["p_yes"]))
                    for i, row in enumerate(b["kept"])
                )
                _baselines[name] = Baseline(kept=kept, since=int(b["since"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        what = f"{file} cannot be read ({error})"
        raise RlhfImgError(f"{what}; delete it, and the judge's drift is measured anew") from error
    for name in _baselines.keys() & _canaries.keys():
        _canaries[name].restore(_baselines.pop(name))


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


def only_model(url: str, api_key_env: str | None = None) -> str:
    """What the server calls its model. Raises RlhfImgError if it does not answer, has none, or has several."""
    if url == FAKE_URL:
        return "fake"
    with _client_needed():
        from rlhf_img.judges.openai import served_models
    names = served_models(url, api_key_env)
    if len(names) == 1:
        return names[0]
    has = f"it has {', '.join(names[:20])}" if names else "it names none"
    raise RlhfImgError(f"say which model of {url} is to judge (--judge-model NAME): {has}")


def _open(config: JudgeConfig) -> Judge:
    if config.url == FAKE_URL:
        return FakeJudge(max_failed=config.max_failed)
    if config.url is None:
        from rlhf_img.judges.local import LocalJudge

        return LocalJudge.load(config)
    with _client_needed():
        from rlhf_img.judges.openai import OpenAIJudge
    return OpenAIJudge(config)


@contextmanager
def _client_needed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"a judge server needs {error.name}, which is not installed"
        raise RlhfImgError(f"{missing}: pip install 'rlhf-img[judge]'") from error
